"""Scoring of the benchmarks that svl corrects (docs/benchmarks.md says what and why), as lmms-eval task code.

Written like `svl.demo.tasks.utils`, whose readers it uses: `process_results` functions give one item per metric with a
`score` of 0 or 1, aggregations take the items of all rows. An answer that cannot be read is wrong.

Where a metric is no plain mean, a `parts` function gives every item's share of it: they sum up to the metric, so that
standard errors and comparisons with another model can be computed sample by sample.
"""

from __future__ import annotations

import ast
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from svl.demo.tasks.utils import (  # noqa: F401 (some are for the YAML files beside)
    accuracy,
    existence,
    f1,
    normalise,
    precision,
    read_letter,
    read_yes_no,
    recall,
    yes_ratio,
)

LETTERS = "ABCDEFGHIJ"
_SAID = re.compile(r"\b(?i:answer|option|choice)\b(?:\s+is|\s*:)?\s*\(?([A-J])\b(?!')")
_LISTED = re.compile(r"^\s*([A-J])[.:)]\s+(.+?)\s*$", re.MULTILINE)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

Item = dict[str, Any]


def read_choice(text: str, options: Mapping[str, Any]) -> str | None:
    """The letter of `options` (letter -> text) that an answer chooses, else None; never a guess.

    It may be the letter ("B", "B.", "(B)", "B. red"), a sentence that says so ("The answer is B"), or exactly one
    option's text.
    """
    if (letter := read_letter(text)) in options:
        return letter
    said = set(_SAID.findall(text))
    if len(said) == 1 and said <= set(options):
        return said.pop()
    same = [letter for letter, option in options.items() if option and normalise(str(option)) == normalise(text)]
    return same[0] if len(same) == 1 else None


def _chosen(text: str, options: Mapping[str, Any], target: str) -> dict[str, Item]:
    answer = read_choice(text, options)
    return {"accuracy": {"score": float(answer == target), "answer": answer}}


def lettered(choices: list[Any]) -> dict[str, Any]:
    """{"A": first choice, ...}."""
    return dict(zip(LETTERS, choices, strict=False))


# ------------------------------------------------------------------------------------- yes or no: POPE, MME


def pope(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """As `existence`; besides, `f1_splits` for the mean over random, popular and adversarial questions."""
    items = existence(doc, results)
    return {**items, "f1_splits": {**items["f1"], "split": doc.get("category")}}


def f1_parts(items: list[Item]) -> list[float]:
    """Shares of the F1 score: its first-order change with each item, plus an equal part of the whole."""
    value = f1(items)
    if math.isnan(value):
        return [math.nan] * len(items)
    said, true = ([item[key] == "yes" for item in items] for key in ("answer", "target"))
    whole = sum(said) + sum(true)
    return [value / len(items) + (2 * (s and t) - value * (s + t)) / whole for s, t in zip(said, true, strict=True)]


def f1_splits(items: list[Item]) -> float:
    """Mean of the F1 scores of the splits, as the LLaVA papers report it."""
    splits = defaultdict(list)
    for item in items:
        splits[item["split"]].append(item)
    return math.fsum(map(f1, splits.values())) / len(splits)


def mme(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """An item for `perception` or `cognition`, and for `total`."""
    answer = read_yes_no(results[0])
    item = {
        "score": float(answer == normalise(doc["answer"])), "answer": answer,
        "pair": str(doc["question_id"]), "category": doc["category"],
    }  # fmt: skip
    return {"cognition" if doc["category"] in COGNITION else "perception": item, "total": item}


def mme_pair(doc: dict[str, Any]) -> str:
    """What the two questions on one image have in common."""
    return f"{doc['category']}/{doc['question_id']}"


def mme_parts(items: list[Item]) -> list[float]:
    """Shares of the MME score: per category, 100 x accuracy + 100 x share of images with both answers right."""
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for item in items:
        pairs[item["category"], item["pair"]].append(item["score"])
    images: dict[str, int] = defaultdict(int)
    for category, _ in pairs:
        images[category] += 1
    parts = []
    for item in items:
        scores = pairs[item["category"], item["pair"]]
        points = 100 * item["score"] + 100 * float(all(scores))
        parts.append(points / len(scores) / images[item["category"]])
    return parts


def mme_score(items: list[Item]) -> float:
    """Sum over categories, each 0 to 200."""
    return math.fsum(mme_parts(items))


# ---------------------------------------------------------------------------------------- multiple choice


def aokvqa_prompt(doc: dict[str, Any], settings: dict[str, str]) -> str:
    """Question and lettered choices."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in lettered(doc["choices"]).items())
    return f"{settings['pre_prompt']}{doc['question']}\n{choices}{settings['post_prompt']}"


def aokvqa_target(doc: dict[str, Any]) -> str:
    """The letter of the right choice."""
    return LETTERS[doc["correct_choice_idx"]]


def aokvqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of A-OKVQA."""
    return _chosen(results[0], lettered(doc["choices"]), aokvqa_target(doc))


def image(doc: dict[str, Any]) -> list[Any]:
    """The document's one image."""
    return [doc["image"].convert("RGB")]


def mmbench_question(doc: dict[str, Any]) -> int:
    """What the rotations of one question have in common (their indices differ by millions)."""
    return int(doc["index"]) % 1_000_000


def mmbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """One rotation of a question."""
    options = {letter: doc[letter] for letter in "ABCDE" if doc.get(letter) and doc[letter] != "nan"}
    items = _chosen(results[0], options, doc["answer"])
    return {"accuracy": {**items["accuracy"], "question": mmbench_question(doc)}}


def mmbench_parts(items: list[Item]) -> list[float]:
    """Shares of the CircularEval accuracy: a question counts if every rotation of its options is answered right."""
    questions = defaultdict(list)
    for item in items:
        questions[item["question"]].append(item["score"])
    rotations = (questions[item["question"]] for item in items)
    return [float(all(scores)) / len(scores) / len(questions) for scores in rotations]


def mmbench_accuracy(items: list[Item]) -> float:
    """CircularEval accuracy."""
    return math.fsum(mmbench_parts(items))


def images_only(dataset: Any) -> Any:
    """The rows of SEED-Bench that show an image, not frames of a video."""
    return dataset.filter(lambda kind: kind == "image", input_columns="data_type")


def seedbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of SEED-Bench."""
    return _chosen(results[0], lettered([doc[f"choice_{c}"] for c in "abcd"]), doc["answer"].strip().upper())


def mmstar(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of MMStar, whose options are part of the question's text."""
    return _chosen(results[0], dict.fromkeys("ABCD"), doc["answer"].strip().upper())


def realworldqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """A letter where the answer is one, else a word or number, exactly."""
    target = doc["answer"].strip()
    if target in tuple("ABCD"):
        options = {**dict.fromkeys("ABCD"), **dict(_LISTED.findall(doc["question"]))}
        return _chosen(results[0], options, target)
    answer = normalise(results[0])
    return {"accuracy": {"score": float(answer == normalise(target)), "answer": answer}}


def mmmu(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice as everywhere here; open questions as lmms-eval scores them."""
    if doc["question_type"] == "multiple-choice":
        return _chosen(results[0], lettered(ast.literal_eval(doc["options"])), doc["answer"])
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    target = doc["answer"]
    if target.startswith("["):
        target = ast.literal_eval(target)
    return {"accuracy": {"score": float(eval_open(target, parse_open_response(results[0]))), "answer": results[0]}}
