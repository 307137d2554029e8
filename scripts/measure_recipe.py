"""Recipes side by side, on questions and on text, without generating answers: minutes instead of hours.

    python scripts/measure_recipe.py --model smol_lvlm --ratios 0.2 --seeds 0 1 2 --store outputs/store \
        --out experiments/recipe/smol_lvlm.csv --recipe strategy=bridge --recipe "strategy=sleb compensation=refit"

A recipe is words of a configuration; its layers and weights are those of `svl` with these words, and finished stages
are shared with other runs of the store. Of the bundled questions (every so manyth, by --questions) it reports the share
whose answer tokens are all the likeliest ones, and their mean loss; of fiction and essays (--passages, --tokens of
each), the loss. Rows are appended to --out as they come, with the seconds that generating texts, choosing layers and
compensating took.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from svl.config import CONF, PACKAGE, register_with_hydra
from svl.data.sample_files import read_samples
from svl.data.samples import Sample
from svl.models.lvlm import Lvlm
from svl.models.sample_inputs import encode_answer
from svl.run.pipeline import Run

QUESTIONS = {
    "demo_lvlm": ("choice", "existence", "open"),
    "smol_lvlm": ("smol_short", "smol_describe"),
    "smollm2_135m": (),
}
PROSE = {"demo_lvlm": (), "smol_lvlm": ("fiction", "essays"), "smollm2_135m": ("fiction", "essays")}
COLUMNS = ("model", "ratio", "seed", "recipe", "removed", "exact", "exact_stderr", "answer_loss")
COLUMNS += ("fiction", "essays", "seconds")


def questions(model: str, n: int) -> list[Sample]:
    """About `n` questions of the benchmark of a model, spread evenly over its tasks."""
    every = [s for name in QUESTIONS[model] for s in read_samples(PACKAGE / f"demo/data/{name}.parquet")]
    return every[:: max(1, len(every) // n)]


@torch.inference_mode()
def answer_scores(lvlm: Lvlm, encoded: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> dict[str, float]:
    """Share of questions whose answer tokens are all the likeliest, its standard error, and mean loss of answers."""
    right, losses = [], []
    for inputs, answer in encoded:
        places = answer.nonzero()[:, 0]
        keep = len(answer) - int(places[0]) + 1
        scores = lvlm.model(**inputs, logits_to_keep=keep).logits[0].float()[: len(places)]
        wanted = inputs["input_ids"][0, places]
        right.append(float((scores.argmax(-1) == wanted).all()))
        losses.append(float(torch.nn.functional.cross_entropy(scores, wanted)))
    share = sum(right) / len(right)
    error = (share * (1 - share) / len(right)) ** 0.5
    return {"exact": share, "exact_stderr": error, "answer_loss": sum(losses) / len(losses)}


@torch.inference_mode()
def text_loss(lvlm: Lvlm, file: Path, passages: int, tokens: int) -> float:
    """Mean loss, in nats per token, of the first tokens of the first passages of a file."""
    tokenizer: Any = lvlm.tokenizer
    total = count = 0.0
    for sample in read_samples(file).samples[:passages]:
        ids = tokenizer(sample.prompt, return_tensors="pt").input_ids[:, :tokens].to(lvlm.device)
        scores = lvlm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(scores[:-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def measured(lvlm: Lvlm, asked: Sequence[Any], model: str, options: argparse.Namespace) -> dict[str, float]:
    """All that is reported of one model."""
    found = answer_scores(lvlm, asked) if asked else {}
    for name in PROSE[model]:
        found[name] = text_loss(lvlm, PACKAGE / f"demo/text/{name}.jsonl", options.passages, options.tokens)
    return {name: round(value, 4) for name, value in found.items()}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for the dense model, then one for every ratio, seed and recipe."""
    always = [f"model={options.model}", f"paths.store={options.store}", f"paths.outputs={options.store}/runs"]
    always += ["benchmark=none", "tracker=none", *options.words]
    register_with_hydra()
    asked: list[Any] = []
    grid = [(ratio, seed, recipe) for ratio in options.ratios for recipe in options.recipe for seed in options.seeds]
    for number, (ratio, seed, recipe) in enumerate(grid):
        words = [*always, *recipe.split(), f"ratio={ratio}", f"calibration.seed={seed}", f"seed={seed}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            run = Run(compose("config", overrides=words), options.store)
        stages = run.prepare()
        dense = run.setup.dense
        if number == 0:
            asked = [encode_answer(dense, sample) for sample in questions(options.model, options.questions)]
            yield {"model": options.model, "recipe": "dense", **measured(dense, asked, options.model, options)}
        entries = [stages.texts, stages.planned, stages.patch]
        yield {
            "model": options.model,
            "ratio": ratio,
            "seed": seed,
            "recipe": recipe,
            "removed": " ".join(map(str, stages.plan.removed)),
            **measured(stages.pruned_model.lvlm, asked, options.model, options),
            "seconds": " ".join(f"{entry.output['work']:.0f}" if entry else "0" for entry in entries),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=sorted(QUESTIONS))
    parser.add_argument("--recipe", action="append", required=True, help="words of a configuration, in quotes")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--words", nargs="*", default=[], help="words of the configuration of every recipe")
    parser.add_argument("--store", type=Path, default=Path("outputs/store"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows(options):
            writer.writerow(row)
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
