"""Measure smol_lvlm and write its model card: accuracy per kind of question, with and without the image; perplexity
beside SmolLM2's; what each single layer's removal costs; where the image is read; which layers look redundant.

    python scripts/card_smol_lvlm.py --command "..."

Reads the training log beside the weights, and writes README.md and figures there. `--questions` and `--texts` say how
much every single-layer removal is scored on; the tables use everything.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import svl
from svl.calibration.calibrate import calibrate
from svl.config import PACKAGE
from svl.core import Plan, Stats
from svl.data.sample_files import read_samples
from svl.demo import smol
from svl.demo.bundled import SMOL, resolve_bundled
from svl.evaluation import perplexity
from svl.evaluation.settings import TaskOptions
from svl.models.lvlm import Lvlm
from svl.report.figures import style
from svl.selectors import all_tokens, last, text, tis, visual
from svl.store.artifacts import Store

DATA, TASKS = PACKAGE / "demo" / "data", str(PACKAGE / "demo" / "tasks")
BLANK = Image.new("RGB", (48, 48), (128, 128, 128))
PROSE = {"fiction": "svl_prose_fiction", "essays": "svl_prose_essays"}
SELECTORS = {
    "all": all_tokens.All(), "visual": visual.Visual(), "text": text.Text(), "last": last.Last(), "TIS": tis.Tis(),
}  # fmt: skip

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [short-lvlm, synthetic]
---
# smol_lvlm

A plain `LlavaForConditionalGeneration` on a real pretrained language model: SmolLM2-135M-Instruct (30 layers of width
576), a 4-layer CLIP ViT (48 px, patch 8: 36 visual tokens) and a two-layer projector, {parameters:.0f} M parameters. It
answers questions in plain English about scenes of coloured shapes, and exists to try layer pruning on a decoder whose
depth was pretrained. Short-LVLM ships what was trained (this folder, {size:.1f} MB) and assembles the checkpoint from
the language model's own package on first use: `svl model=smol_lvlm`.

The low-rank updates are merged. The chat format is SmolLM2's, without its default system message; its unused special
token `<reponame>` became `<image>`, so the vocabulary has not changed. SmolLM2's weights come from a 4-bit file (Q4_1).

## Training

```bash
{command}
```

{images} images in {steps} steps of about a dozen questions each, on two CPU cores shared with other work. Vision tower:
from scratch, to say what every cell holds. Projector: first regressed onto sums of SmolLM2's embeddings of the words
for what a patch shows, without the language model, then trained together with LoRA (rank 16, all linear layers). KL
divergence from SmolLM2 on texts that it wrote itself keeps its language.{note}

![training](training.png)

## Accuracy

{total} held-out questions, one per scene, on scenes disjoint from training and calibration; exact match in %, with the
standard error. *Blank*: the same questions with a grey image, i.e. what can be had from the question alone.

{accuracy}

## Language

Perplexity on held-out prose, with the standard error: {texts} passages each.

{perplexity}

## What each layer does

One layer removed: accuracy over {few_questions} of the questions, and the change of the loss on {few_texts} passages of
each prose.

![single layers](layers.png)

Where the image is read, and which layers look redundant (on 64 calibration questions). Left: the share of their
attention that text tokens pay to the image, and that the last token (which predicts the answer) does; a uniform share
is the dotted line. Right: cosine of a layer's input and output, averaged over the tokens that each selector takes.

![attention and cosine](reading.png)

Measured by `python scripts/card_smol_lvlm.py`.
"""


def held_out() -> list[dict]:
    """All held-out questions: image, prompt, answer, kind."""
    files = (DATA / f"smol_{name}.parquet" for name in ("short", "describe"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


@torch.inference_mode()
def correct(lvlm: Lvlm, rows: list[dict], blank: bool = False, size: int = 24) -> np.ndarray:
    """0/1 per question: whether the greedy answer is the expected one.

    It is if and only if each of the answer's tokens, its end included, is the most likely after those before it.
    """
    marks = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"] + rows[i]["answer"]))
    end = lvlm.tokenizer.eos_token
    for start in range(0, len(rows), size):
        batch = [rows[i] for i in order[start : start + size]]
        images = [[BLANK if blank else Image.open(io.BytesIO(row["image"]["bytes"]))] for row in batch]
        texts = [lvlm.prompt(row["prompt"], images=1) + row["answer"] + end for row in batch]
        inputs = lvlm.encode(texts, images)
        likely = lvlm.model(**inputs, use_cache=False).logits.argmax(-1)[:, :-1]
        for i, row, ids, said in zip(order[start:], batch, inputs["input_ids"][:, 1:], likely, strict=False):
            n = len(lvlm.tokenizer(row["answer"] + end, add_special_tokens=False)["input_ids"])
            marks[i] = bool((ids[-n:] == said[-n:]).all())
    return marks


def prose(lvlm: Lvlm, limit: int | None = None) -> dict[str, dict]:
    """Loss and perplexity on each prose, as `svl.perplexity` gives them."""
    options = TaskOptions(metric="perplexity", limit=limit, batch_size=4, include_path=TASKS)
    with tempfile.TemporaryDirectory() as folder:
        return {name: perplexity.evaluate_perplexity(lvlm, task, options, Path(folder)) for name, task in PROSE.items()}


def reading(lvlm: Lvlm) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per layer: share of attention to the image by kind of token, and cosine by selector."""
    stats = calibrate(lvlm, read_samples(DATA / "smol_calibration.parquet", 64), statistics=("cosine", "attention"))
    share: dict[str, list[np.ndarray]] = {"text tokens": [], "last token": [], "uniform": []}
    for trace in stats.traces:
        assert trace.emitted is not None
        assert trace.keys is not None
        after = ~trace.visual & (torch.arange(len(trace.visual)) > trace.visual.nonzero().max())
        share["text tokens"].append(trace.emitted[:, 0, after].mean(-1).numpy())
        share["last token"].append(trace.emitted[:, 0, -1].numpy())
        seen = trace.keys[:, :, after].expand(stats.n_layers, -1, -1)
        share["uniform"].append((seen[:, 0] / seen.sum(1)).mean(-1).numpy())
    cosine = {
        name: Stats(stats.n_layers, stats.removable, stats.traces, selector).cosine().numpy()
        for name, selector in SELECTORS.items()
    }
    return {name: np.mean(values, 0) for name, values in share.items()}, cosine


# ---------------------------------------------------------------------------------------------- figures


def above(ax) -> None:
    """The legend above the axes, where it hides nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=7)


def lines(ax, values: dict[str, np.ndarray], **labels) -> None:
    """One marked line per name over the layers."""
    for (name, color), marker in zip(style.colors(list(values)).items(), style.MARKERS, strict=False):
        dotted = name == "uniform"
        ax.plot(values[name], ":" if dotted else "-", color="#888888" if dotted else color,
                marker=None if dotted else marker, markersize=3, label=name)  # fmt: skip
    ax.set(xlabel="layer", **labels)
    ax.grid(True)
    above(ax)


def training(log: Path) -> Figure:
    """Loss, drift and validation accuracy against the step."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(style.WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = {row["step"]: row for row in rows if row["stage"] == "train"}  # of a repeated step, the last
    for key, label, color in (("loss", "loss per answer token", 0), ("drift", "KL from SmolLM2 per text token", 1)):
        left.plot(list(steps), [row[key] for row in steps.values()], color=style.PALETTE[color], label=label)
    left.set(xlabel="step", ylabel="nats", yscale="log")
    tried = {row["step"]: row for row in rows if row["stage"] == "validation"}
    for i, kind in enumerate(smol.ASKED):
        at = [step for step, row in tried.items() if kind in row]
        right.plot(at, [100 * tried[step][kind] for step in at], color=style.PALETTE[i % 7],
                   ls="--" if i > 6 else "-", label=kind)  # fmt: skip
    right.set(xlabel="step", ylabel="validation accuracy (%)", ylim=(0, 101))
    for ax in (left, right):
        above(ax)
        ax.grid(True)
    return figure


def removals(accuracy: np.ndarray, dense: float, losses: dict[str, np.ndarray]) -> Figure:
    """Accuracy and change of the loss with each single layer removed."""
    figure = Figure(figsize=(style.WIDTH, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(range(len(accuracy)), accuracy, color=style.PALETTE[0])
    upper.axhline(dense, color="black", lw=0.8, ls="--", label="dense")
    upper.set(ylabel="accuracy (%)", ylim=(0, 100))
    above(upper)
    for (name, change), color, marker in zip(losses.items(), style.PALETTE, style.MARKERS, strict=False):
        lower.plot(change, color=color, marker=marker, markersize=4, label=name)
    lower.set(xlabel="removed layer", ylabel="change of loss (nats)", yscale="log", xticks=range(0, len(accuracy), 2))
    lower.grid(True)
    above(lower)
    return figure


def redundancy(share: dict[str, np.ndarray], cosine: dict[str, np.ndarray]) -> Figure:
    """Attention to the image and cosine of input and output, per layer."""
    figure = Figure(figsize=(style.WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines(left, share, ylabel="attention to the image", ylim=(0, 1))
    lines(right, cosine, ylabel="cosine of input and output")
    return figure


# ------------------------------------------------------------------------------------------------- main


def percent(marks: np.ndarray) -> str:
    return f"{100 * marks.mean():.1f} ± {100 * marks.std(ddof=1) / len(marks) ** 0.5:.1f}"


def value(result: dict) -> str:
    metric = result["metrics"]["perplexity"]
    return f"{metric['value']:.2f} ± {metric['stderr']:.2f}"


def table(head: str, rows: Iterable[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|---" + "|---:" * (columns - 1) + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=SMOL / "log.jsonl", help="of the training run")
    parser.add_argument("--command", required=True, help="how the model was trained")
    parser.add_argument("--note", default="", help="what else to know about the run")
    parser.add_argument("--batch", type=int, default=8, help="images per training step")
    parser.add_argument("--store", type=Path, default=Path("outputs/store"))
    parser.add_argument("--questions", type=int, default=240, help="questions that single layers are scored on")
    parser.add_argument("--texts", type=int, default=4, help="passages of each prose, likewise")
    args = parser.parse_args()
    store = Store(args.store)
    base, lvlm = (
        svl.load(resolve_bundled(f"svl:{name}", store), dtype="bfloat16", device="cpu")
        for name in ("smollm2_135m", "smol_lvlm")
    )
    rows = held_out()
    kinds = np.array([row["kind"] for row in rows])
    dense, blank = correct(lvlm, rows), correct(lvlm, rows, blank=True)
    accuracy = table("| kind | questions | accuracy | blank image |", [
        *(f"| {k} | {(kinds == k).sum()} | {percent(dense[kinds == k])} | {percent(blank[kinds == k])} |"
          for k in smol.ASKED),
        f"| **all** | {len(rows)} | {percent(dense)} | {percent(blank)} |",
    ])  # fmt: skip
    print(accuracy, flush=True)
    own, original = prose(lvlm), prose(base)
    language = table("| prose | SmolLM2 | smol_lvlm | ratio |", (
        f"| {name} | {value(original[name])} | {value(own[name])} | "
        f"{own[name]['metrics']['perplexity']['value'] / original[name]['metrics']['perplexity']['value']:.3f} |"
        for name in PROSE
    ))  # fmt: skip
    print(language, flush=True)

    n = lvlm.anatomy.n_layers
    few = [rows[i] for i in np.linspace(0, len(rows) - 1, args.questions).astype(int)]
    whole, before = 100 * correct(lvlm, few).mean(), prose(lvlm, args.texts)
    single, change = np.zeros(n), {name: np.zeros(n) for name in PROSE}
    for i in tqdm(range(n), desc="single layers"):
        pruned = svl.apply(lvlm, Plan(n, (i,)))
        single[i] = 100 * correct(pruned, few).mean()
        for name, result in prose(pruned, args.texts).items():
            change[name][i] = result["metrics"]["loss"]["value"] - before[name]["metrics"]["loss"]["value"]
    print("dense", round(whole, 1), "without each layer", single.round(1).tolist())
    print("change of loss", {name: values.round(3).tolist() for name, values in change.items()})
    share, cosine = reading(lvlm)

    with matplotlib.rc_context(style.STYLE):
        style.write_figure(training(args.log), SMOL / "training.png")
        style.write_figure(removals(single, float(whole), change), SMOL / "layers.png")
        style.write_figure(redundancy(share, cosine), SMOL / "reading.png")
    trained = [row for line in args.log.read_text().splitlines() if (row := json.loads(line))["stage"] == "train"]
    steps = max(row["step"] for row in trained)
    (SMOL / "README.md").write_text(CARD.format(
        parameters=lvlm.parameters() / 1e6, size=(SMOL / "trained.safetensors").stat().st_size / 1e6,
        command=args.command, steps=steps, images=steps * args.batch, note=args.note and f" {args.note}",
        total=len(rows), accuracy=accuracy, perplexity=language, texts=own["essays"]["n"],
        few_questions=len(few), few_texts=args.texts,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
