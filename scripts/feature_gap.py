"""How far removed layers throw the residual stream off, and how much of that each compensation takes back.

    python scripts/feature_gap.py --store outputs/store --experiment ablation_bridge --model svl:smol_lvlm \
        --samples svl/demo/data/smol_calibration.parquet --out experiments/claims_smol_lvlm

For every finished run of an experiment (of one ratio), on samples that need not be those it was fitted on: at each kept
layer behind the first removed one, and at the end, the mean over tokens of |h' - h|^2 / |h|^2, where h is what enters
that layer in the dense model and h' in the pruned one, without and with the run's patch. Prints a table: the gap where
the decoder ends and the mean over all places, without the patch; the share of each that the patch takes away; the
average score, and what share of the loss of the run without compensation it makes good. Runs that differ in the seed
alone are one row, with mean and standard deviation. Writes feature_gap.csv with all places, feature_gap_layers.csv with
the gap that every layer would leave alone, and a figure. Gaps of runs are kept in the store, for svl-report to draw.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from svl.calibration.activations import Activations
from svl.core import Patch, Plan, Stats
from svl.data.sample_files import read_samples
from svl.data.samples import Samples
from svl.demo import bundled
from svl.models import loading, lvlm
from svl.pruning import patch_file
from svl.run.keys import versions
from svl.store.artifacts import Entry, Store

LABEL = ("strategy", "selector", "compensation")


def gaps(lvlm: lvlm.Lvlm, examples: Samples, plan: Plan, patch: Patch | None = None) -> dict[int, float]:
    """Relative squared error by layer (L: behind all), for kept layers behind the first removed one."""
    hidden = Activations(lvlm, examples, Stats(plan.n_layers, lvlm.anatomy.removable))
    points = [i for i in (*plan.kept, plan.n_layers) if i > plan.removed[0]]
    total, tokens = dict.fromkeys(points, 0.0), 0
    for dense, pruned in zip(hidden.stream(points), hidden.stream(points, plan=plan, patch=patch), strict=True):
        tokens += dense.weights.shape[-1]
        for i in points:
            h = dense.h(i)
            total[i] += float(((pruned.h(i) - h).square().sum(-1) / h.square().sum(-1)).sum())
    return {i: value / tokens for i, value in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("outputs/store"))
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id or svl:NAME of its runs")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=100, help="which samples, if there are more")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    store = Store(args.store, versions())
    lvlm = loading.load(
        bundled.resolve_bundled(args.model, store), dtype=args.dtype, name=Path(args.model.rpartition(":")[2]).name
    )
    examples = read_samples(args.samples, args.n, args.seed)
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in store.entries("run"):
        run = entry.output
        ours = run["name"] == args.experiment and run["model"] == lvlm.name
        if ours and run["n_remove"] and abs(run["ratio"] - args.ratio) <= 0.02:
            groups[run["strategy"], run["selector"] or "", run["compensation"]].append(entry)
    if not groups:
        sys.exit(f"no finished run of '{args.experiment}' on {lvlm.name} near ratio {args.ratio:g} in {store.root}")
    found: list[tuple[tuple[str, str, str], list[Measured]]] = []
    for label, runs in sorted(groups.items()):
        found.append((label, [measured(lvlm, examples, store, run) for run in runs]))
        print(" ".join(label), f"{len(runs)} runs", file=sys.stderr, flush=True)
    bare = {m.key: m for (_, _, c), ms in found for m in ms if c == "none"}
    head = (*LABEL, "seeds", "end: gap", "closed", "mean: gap", "closed", "score", "made good")
    print(f"| {' | '.join(head)} |\n|---|---|---|{'---:|' * 7}")
    for label, runs in found:
        columns = [[m.alone[m.end] for m in runs], [1 - m.patched[m.end] / m.alone[m.end] for m in runs]]
        means = [(fmean(m.alone.values()), fmean(m.patched.values())) for m in runs]
        columns += [[a for a, _ in means], [1 - p / a for a, p in means]]
        columns += [[m.score for m in runs], [made_good(m, bare[m.key]) for m in runs if m.key in bare]]
        print(f"| {' | '.join(label)} | {len(runs)} | {' | '.join(map(spread, columns))} |", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [(*label, m.seeds, i, m.alone[i], m.patched[i]) for label, ms in found for m in ms for i in m.alone]
    write(args.out / "feature_gap.csv", (*LABEL, "seed", "layer", "alone", "patched"), rows)
    write(args.out / "feature_gap_layers.csv", ("layer", "gap"), enumerate(single(lvlm, examples)))
    figure(rows, args.out / "feature_gap.png")


@dataclass(frozen=True)
class Measured:
    """One run and the gaps of its model, by layer, without and with its patch."""

    run: dict[str, Any]
    alone: dict[int, float]
    patched: dict[int, float]

    @property
    def end(self) -> int:
        """Behind all layers."""
        return max(self.alone)

    @property
    def seeds(self) -> str:
        """What tells runs of one method apart."""
        return f"{self.run['seed']}/{self.run['settings'].get('calibration', {}).get('seed', '')}"

    @property
    def key(self) -> tuple[str, str]:
        """Equal for runs that differ in the compensation alone."""
        return self.run["strategy"], self.seeds

    @property
    def score(self) -> float:
        """The average over the benchmark."""
        return self.run["average"]["value"]


def measured(lvlm: lvlm.Lvlm, examples: Samples, store: Store, entry: Entry) -> Measured:
    """The gaps of a run, measured once and then read from the store."""
    run = entry.output
    plan = Plan(run["plan"]["n_layers"], tuple(run["plan"]["removed"]))
    file = next((store.root / "patch" / key / "patch.safetensors" for key in run["keys"]["compensate"]), None)

    def build(_: Path) -> dict[str, Any]:
        alone = gaps(lvlm, examples, plan)
        patched = gaps(lvlm, examples, plan, patch_file.load_patch(file)) if file and file.exists() else alone
        lines = {"layers": list(alone), "alone": list(alone.values()), "patched": list(patched.values())}
        return {"run": entry.key, "samples": len(examples), **lines}

    found = store.make("gap", {"run": entry.key, "examples": examples.fingerprint}, build).output
    return Measured(run, *(dict(zip(found["layers"], found[name], strict=True)) for name in ("alone", "patched")))


def made_good(run: Measured, bare: Measured) -> float:
    """The share of what pruning alone costs that the compensation gives back."""
    lost = run.run["average"]["dense"] - bare.score
    return (run.score - bare.score) / lost if lost else math.nan


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "") if values else "–"


def single(lvlm: lvlm.Lvlm, examples: Samples) -> list[float]:
    """For every layer: mean over tokens of |h_{i+1} - h_i|^2 / |h_{i+1}|^2, what its removal alone leaves behind it."""
    n = lvlm.anatomy.n_layers
    total, tokens = [0.0] * n, 0
    for sample in Activations(lvlm, examples, Stats(n, lvlm.anatomy.removable)).stream(range(n + 1)):
        tokens += sample.weights.shape[-1]
        for i in range(n):
            below, above = sample.h(i), sample.h(i + 1)
            total[i] += float(((above - below).square().sum(-1) / above.square().sum(-1)).sum())
    return [value / tokens for value in total]


def write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, numbers with six digits."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(head)
        table.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)


def figure(rows: Sequence[tuple], path: Path) -> None:
    """Relative squared error by layer: one panel per choice of layers, one line (mean over seeds) per compensation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    strategies = list(dict.fromkeys(row[0] for row in rows))
    _, axes = plt.subplots(1, len(strategies), figsize=(4.2 * len(strategies), 3.4), sharey=True, squeeze=False)
    names = list(dict.fromkeys(row[2] for row in rows))
    for axis, strategy in zip(axes[0], strategies, strict=True):
        for number, name in enumerate(names):
            points: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                if row[0] == strategy and row[2] == name:
                    points[row[4]].append(row[6])
            if points:
                line = sorted((layer, fmean(values)) for layer, values in points.items())
                axis.plot(*zip(*line, strict=True), ".-", color=f"C{number}", label=name, linewidth=1.2)
        axis.set(title=strategy, xlabel="layer (the last: after all layers)", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean |h' - h|² / |h|²")
    axes[0][-1].legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
