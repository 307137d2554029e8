"""How far removed layers throw the residual stream off, and how much of that each compensation takes back.

    python scripts/feature_gap.py --store outputs/store --experiment ablation_bridge --model svl:smol_lvlm \
        --samples svl/demo/data/smol_calibration.parquet --out experiments/claims_smol_lvlm

For every finished run of an experiment (of one ratio), on samples that need not be those it was fitted on: at each kept
layer behind the first removed one, and at the end, the mean over tokens of |h' - h|^2 / |h|^2, where h is what enters
that layer in the dense model and h' in the pruned one, without and with the run's patch. Prints a table of three
places (right behind the last removed layer, the mean over all, the end); writes feature_gap.csv with all of them, and a
figure. What it measures is kept in the store, so that svl-report draws it, too.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svl import bundled, loading, surgery
from svl.calibrate import Activations
from svl.core import Patch, Plan, Stats
from svl.data import Examples, read_samples
from svl.pipeline import versions
from svl.store import Store


def gaps(lvlm: loading.Lvlm, examples: Examples, plan: Plan, patches: Sequence[Patch | None]) -> list[dict[int, float]]:
    """For every patch: relative squared error by layer (L: the end), for kept layers behind the first removed one."""
    hidden = Activations(lvlm, examples, Stats(plan.n_layers, lvlm.anatomy.removable))
    points = [i for i in (*plan.kept, plan.n_layers) if i > plan.removed[0]]
    total = [dict.fromkeys(points, 0.0) for _ in patches]
    tokens = 0
    for dense, *pruned in zip(
        hidden.stream(points), *(hidden.stream(points, plan=plan, patch=patch) for patch in patches), strict=True
    ):
        tokens += len(dense.weights)
        for sums, sample in zip(total, pruned, strict=True):
            for i in points:
                h = dense.h(i)
                sums[i] += float(((sample.h(i) - h).square().sum(-1) / h.square().sum(-1)).sum())
    return [{i: value / tokens for i, value in sums.items()} for sums in total]


def stored(
    store: Store, run: str, lvlm: loading.Lvlm, examples: Examples, plan: Plan, patch: Patch | None
) -> list[dict[int, float]]:
    """The gaps of a run without and with its patch, measured once and then read from the store."""

    def build(_: Path) -> dict[str, Any]:
        alone, *rest = gaps(lvlm, examples, plan, [None, patch] if patch else [None])
        patched = rest[0] if rest else alone
        lines = {"layers": list(alone), "alone": list(alone.values()), "patched": list(patched.values())}
        return {"run": run, "samples": len(examples), **lines}

    found = store.make("gap", {"run": run, "examples": examples.fingerprint}, build).output
    return [dict(zip(found["layers"], found[name], strict=True)) for name in ("alone", "patched")]


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
        bundled.resolve(args.model, store), dtype=args.dtype, name=Path(args.model.rpartition(":")[2]).name
    )
    examples = read_samples(args.samples, args.n, args.seed)
    rows: list[tuple[str, str, int, float, float]] = []
    seen = set()
    print("| strategy | selector | compensation | removed | behind them: alone | patched | mean: alone | patched "
          "| end: alone | patched |\n| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    for entry in store.entries("run"):
        run = entry.output
        label = (run["strategy"], run["selector"] or "", run["compensation"])
        if run["name"] != args.experiment or run["model"] != lvlm.name or abs(run["ratio"] - args.ratio) > 0.02:
            continue
        if label in seen or not run["n_remove"]:
            continue
        seen.add(label)
        plan = Plan(run["plan"]["n_layers"], tuple(run["plan"]["removed"]))
        file = next((store.root / "patch" / key / "patch.safetensors" for key in run["keys"]["compensate"]), None)
        patch = surgery.load_patch(file) if file and file.exists() else None
        alone, patched = stored(store, entry.key, lvlm, examples, plan, patch)
        rows += [(*label, i, alone[i], patched[i]) for i in alone]
        behind = min(i for i in alone if i > max(plan.removed))
        pairs = [(d[behind], sum(d.values()) / len(d), d[plan.n_layers]) for d in (alone, patched)]
        numbers = [pair[place] for place in range(3) for pair in pairs]
        print(f"| {' | '.join(label)} | {', '.join(map(str, plan.removed))} | "
              + " | ".join(f"{x:.3f}" for x in numbers) + " |", flush=True)  # fmt: skip
    if not rows:
        parser.error(f"{store.root} has no run of {lvlm.name} in experiment {args.experiment} at ratio {args.ratio:g}")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "feature_gap.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("strategy", "selector", "compensation", "layer", "alone", "patched"))
        table.writerows((*row[:4], f"{row[4]:.6g}", f"{row[5]:.6g}") for row in rows)
    figure(rows, args.out / "feature_gap.png")


def figure(rows: Sequence[tuple], path: Path) -> None:
    """Relative squared error by layer: one panel per choice of layers, one line per compensation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    strategies = list(dict.fromkeys(row[0] for row in rows))
    _, axes = plt.subplots(1, len(strategies), figsize=(4.2 * len(strategies), 3.4), sharey=True, squeeze=False)
    names = list(dict.fromkeys(row[2] for row in rows))
    for axis, strategy in zip(axes[0], strategies, strict=True):
        for number, name in enumerate(names):
            points = [(row[3], row[5]) for row in rows if row[0] == strategy and row[2] == name]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", color=f"C{number}", label=name, linewidth=1.2)
        axis.set(title=strategy, xlabel="layer (the last: after all layers)", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean |h' - h|² / |h|²")
    axes[0][-1].legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
