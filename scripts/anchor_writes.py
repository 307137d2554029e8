"""What the layers in front of gaps write to the residual stream, before and after a compensation.

    python scripts/anchor_writes.py --store outputs/store --experiment claims_smol_lvlm --model svl:smol_lvlm \
        --samples svl/demo/data/smol_calibration.parquet --out experiments/claims_smol_lvlm

For every layer whose down_proj some finished run of the experiment changes (one ratio, seed 0, the named strategies):
the norms of what it writes to every token of a few samples, in the dense model and in each pruned and compensated one.
Prints per layer and strategy the median norm, the largest, and their ratio. Writes anchor_writes.csv with every token
and a figure.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from statistics import median

import torch

from svl.calibration.activations import Activations
from svl.core import Plan, Stats
from svl.data.sample_files import read_samples
from svl.data.samples import Samples
from svl.demo import bundled
from svl.models import loading
from svl.models.lvlm import Lvlm
from svl.pruning import patch_file
from svl.run.keys import versions
from svl.store.artifacts import Entry, Store

Norms = dict[int, list[float]]  # of every token, by layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("outputs/store"))
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id or svl:NAME of its runs")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--strategies", nargs="+", default=["short_lvlm_paper", "short_lvlm"])
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--n", type=int, default=4, help="samples")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    store = Store(args.store, versions())
    lvlm = loading.load(bundled.resolve_bundled(args.model, store), name=Path(args.model.rpartition(":")[2]).name)
    samples = read_samples(args.samples, args.n, 0)
    runs = {
        strategy: finished_run(store, args.experiment, lvlm.name, strategy, args.ratio) for strategy in args.strategies
    }
    patches = {strategy: patch_file.load_patch(patch_of(store, run)) for strategy, run in runs.items()}
    anchors = sorted({layer for patch in patches.values() for layer, role in patch.updates if role == "mlp"})
    found = {"dense": writes(lvlm, samples, anchors)}
    for strategy, run in runs.items():
        plan = Plan(run.output["plan"]["n_layers"], tuple(run.output["plan"]["removed"]))
        found[strategy] = writes(lvlm, samples, anchors, plan, patches[strategy])

    print("| layer | model | median norm | largest | ratio |\n|---:|---|---:|---:|---:|")
    for layer in anchors:
        for name, norms in found.items():
            usual, largest = median(norms[layer]), max(norms[layer])
            print(f"| {layer} | {name} | {usual:.3g} | {largest:.4g} | {largest / usual:.1f} |")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "anchor_writes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["layer", "token", *found])
        for layer in anchors:
            columns = [norms[layer] for norms in found.values()]
            table.writerows([layer, t, *(f"{x:.5g}" for x in row)] for t, row in enumerate(zip(*columns, strict=True)))
    figure(found, anchors, args.out / "anchor_writes.png")


def finished_run(store: Store, experiment: str, model: str, strategy: str, ratio: float) -> Entry:
    """The experiment's first run of a strategy near a ratio."""
    for entry in store.entries("run"):
        run = entry.output
        ours = (run["name"], run["model"], run["strategy"]) == (experiment, model, strategy)
        if ours and run["n_remove"] and abs(run["ratio"] - ratio) <= 0.02:
            return entry
    sys.exit(f"no finished run of '{experiment}' with strategy={strategy} on {model} near ratio {ratio:g}")


def patch_of(store: Store, run: Entry) -> Path:
    """The file with the weights that a run changes."""
    for key in run.output["keys"]["compensate"]:
        if (file := store.root / "patch" / key / "patch.safetensors").is_file():
            return file
    sys.exit(f"run {run.key} changes no weight")


@torch.no_grad()
def writes(lvlm: Lvlm, samples: Samples, layers: list[int], plan: Plan | None = None, patch=None) -> Norms:
    """Norms of what down_proj of `layers` writes to every token of the samples."""
    norms: Norms = {layer: [] for layer in layers}
    hidden = Activations(lvlm, samples, Stats(lvlm.anatomy.n_layers, lvlm.anatomy.removable))
    for sample in hidden.stream((), [(layer, "mlp") for layer in layers], plan, patch):
        for layer in layers:
            norms[layer] += torch.linalg.vector_norm(sample.wrote(layer, "mlp"), dim=-1).tolist()
    return norms


def figure(found: dict[str, Norms], layers: list[int], path: Path) -> None:
    """One panel per layer: the norm of every token, tokens ordered by what the dense model writes to them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(1, len(layers), figsize=(4.2 * len(layers), 3.4), squeeze=False)
    for axis, layer in zip(axes[0], layers, strict=True):
        order = sorted(range(len(found["dense"][layer])), key=lambda t: -found["dense"][layer][t])
        for (name, norms), (color, style) in zip(found.items(), (("0.3", "-"), ("C1", "."), ("C0", "x")), strict=False):
            axis.plot([norms[layer][t] for t in order], style, color=color, label=name, markersize=4)
        axis.set(title=f"layer {layer}", xscale="symlog", yscale="log", xlabel="tokens, by the dense model's norm")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("norm of what down_proj writes")
    axes[0][-1].legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
