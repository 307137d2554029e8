"""Measure the bundled LVLM and write its model card: accuracy per kind of question, with the image blanked, and without
each single layer.

    python scripts/card_demo_lvlm.py --log runs/demo_lvlm/log.jsonl

`--log` is the training log (for the curve). Writes README.md, training.png and layers.png next to the checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import svl
from svl.config import PACKAGE
from svl.core import Plan
from svl.models.lvlm import Lvlm

FOLDER = PACKAGE / "demo" / "demo_lvlm"
BLANK = Image.new("RGB", (64, 64), (128, 128, 128))

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [short-lvlm, synthetic]
---
# The bundled LVLM

A genuine `LlavaForConditionalGeneration` small enough to ship in a package: {parameters:.1f} M parameters, {layers}
Llama layers of width {width}, a 3-layer CLIP ViT (64 px, patch 8: 64 visual tokens for 4 to 8 shapes, so most of them
are background), its own word-level tokenizer and chat template. It answers questions about scenes of coloured shapes
and exists to try layer pruning on; it knows nothing else.

Made from nothing by one command, from seed 0, in {steps} steps of 16 images:

```bash
{command}
```

## Accuracy

{questions} held-out questions on scenes disjoint from training. *Blank*: the same questions with a grey image, i.e.
what can be had from the question alone. All numbers in %, with the standard error.

{table}

`relation1` .. `relation3` follow one to three steps ("Start at the red circle, go left, down: what color is it?");
every step leads to the next shape in that direction, however far, so the steps cannot be added up.

![training curve](training.png)

## What each layer does

Accuracy (points, change against dense) with a single layer removed:

![single layers](layers.png)

Measured by `python scripts/card_demo_lvlm.py`.
"""


def questions() -> list[dict]:
    """All held-out questions: image, prompt, answer, kind."""
    rows = []
    for name in ("existence", "choice", "open"):
        rows += pyarrow.parquet.read_table(PACKAGE / "demo" / "data" / f"{name}.parquet").to_pylist()
    return sorted(rows, key=lambda row: len(row["prompt"]))


@torch.inference_mode()
def correct(lvlm: Lvlm, rows: list[dict], blank: bool = False) -> dict[str, np.ndarray]:
    """0/1 per question by kind: exact match of the greedy answer."""
    marks = defaultdict(list)
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        images = [[BLANK if blank else Image.open(io.BytesIO(row["image"]["bytes"]))] for row in batch]
        inputs = lvlm.encode([lvlm.prompt(row["prompt"], images=1) for row in batch], images)
        out = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answers = lvlm.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(batch, answers, strict=True):
            marks[row["kind"]].append(answer.strip() == row["answer"])
    return {kind: np.array(values, dtype=float) for kind, values in marks.items()}


def curve(log: Path) -> Figure:
    """Training loss and validation accuracy per kind against the step."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    train = {row["step"]: row["loss"] for row in rows if row["stage"] == "train"}
    loss.plot(list(train), list(train.values()), color="#0072B2")
    loss.set(xlabel="step", ylabel="loss (nats per answer token)", yscale="log")
    held_out = {row["step"]: row for row in rows if row["stage"] == "validation"}
    for kind in ("existence", "attribute", "count", "compare", "relation1", "relation2", "relation3", "choice"):
        values = {step: 100 * row[kind] for step, row in held_out.items() if kind in row}
        accuracy.plot(list(values), list(values.values()), label=kind)
    accuracy.set(xlabel="step", ylabel="validation accuracy (%)", ylim=(0, 101))
    accuracy.legend(fontsize=8, ncols=2)
    return figure


def layer_map(change: np.ndarray, kinds: list[str]) -> Figure:
    """Heat map [kinds, layers] of the change of accuracy in points."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    ax = figure.subplots()
    shown = ax.imshow(change, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
    ax.set(xlabel="removed layer", xticks=range(change.shape[1]), yticks=range(len(kinds)), yticklabels=kinds)
    for (row, column), value in np.ndenumerate(change):
        ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                color="white" if abs(value) > 60 else "black")  # fmt: skip
    figure.colorbar(shown, label="change (points)")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="log.jsonl of the training run")
    parser.add_argument("--command", default="python scripts/train_demo_lvlm.py --out runs/demo_lvlm")
    args = parser.parse_args()
    lvlm, rows = svl.load(FOLDER), questions()
    dense, blank = correct(lvlm, rows), correct(lvlm, rows, blank=True)
    kinds = ["existence", "attribute", "count", "compare", "relation1", "relation2", "relation3", "choice"]
    n = lvlm.anatomy.n_layers
    single = [correct(svl.apply(lvlm, Plan(n, (i,))), rows) for i in tqdm(range(n), desc="single layers")]
    change = np.array([[100 * (one[k].mean() - dense[k].mean()) for one in single] for k in kinds])

    def cell(marks: np.ndarray) -> str:
        return f"{100 * marks.mean():.1f} ± {100 * marks.std(ddof=1) / len(marks) ** 0.5:.1f}"

    table = ["| kind | questions | accuracy | blank image |", "|---|---:|---:|---:|"]
    table += [f"| {k} | {len(dense[k])} | {cell(dense[k])} | {cell(blank[k])} |" for k in kinds]
    everything = [np.concatenate([marks[k] for k in kinds]) for marks in (dense, blank)]
    table.append(f"| **all** | {len(rows)} | {cell(everything[0])} | {cell(everything[1])} |")
    print("\n".join(table))
    overall = [100 * (np.concatenate([one[k] for k in kinds]).mean() - everything[0].mean()) for one in single]
    print("single layer removed, change of all (points):", [round(float(x), 1) for x in overall])

    steps = max(json.loads(line).get("step", 0) for line in args.log.read_text().splitlines())
    curve(args.log).savefig(FOLDER / "training.png", dpi=110)
    layer_map(change, kinds).savefig(FOLDER / "layers.png", dpi=110)
    text = lvlm.model.config.text_config
    card = CARD.format(
        parameters=lvlm.parameters() / 1e6, layers=n, width=text.hidden_size, steps=steps, command=args.command,
        questions=len(rows), table="\n".join(table),
    )  # fmt: skip
    (FOLDER / "README.md").write_text(card)


if __name__ == "__main__":
    main()
