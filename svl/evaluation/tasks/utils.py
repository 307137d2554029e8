"""Scoring of the benchmarks that svl corrects (docs/benchmarks.md says what and why), as lmms-eval task code.

`process_results` functions give one item per metric, aggregations and `parts` functions take the items of all rows
(svl.evaluation.task_metrics). Answers are read by svl.evaluation.reading.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from svl.data.pictures import open_picture
from svl.evaluation.reading import normalise, read_choice, read_yes_no
from svl.evaluation.task_metrics import (
    Item,
    accuracy,
    circular_accuracy,
    circular_parts,
    count,
    count_f1,
    count_positives,
    count_questions,
    count_said_yes,
    f1,
    f1_parts,
    f1_splits,
    mme_parts,
    mme_score,
    precision,
    recall,
    scored,
    yes_no_items,
    yes_ratio,
)

# what the YAML files name besides the functions below
__all__ = [
    "accuracy",
    "circular_accuracy",
    "circular_parts",
    "count",
    "count_f1",
    "count_positives",
    "count_questions",
    "count_said_yes",
    "f1",
    "f1_parts",
    "f1_splits",
    "mme_parts",
    "mme_score",
    "precision",
    "recall",
    "yes_ratio",
]

LETTERS = "ABCDEFGHIJ"
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_LISTED = re.compile(r"^\s*([A-J])[.:)]\s+(.+?)\s*$", re.MULTILINE)


def _choice(text: str, options: Mapping[str, Any], target: str) -> dict[str, Item]:
    return {"accuracy": scored(read_choice(text, options), target)}


def lettered(choices: list[Any]) -> dict[str, Any]:
    """{"A": first choice, ...}."""
    return dict(zip(LETTERS, choices, strict=False))


# ------------------------------------------------------------------------------------- yes or no: POPE, MME


def pope(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Items of a yes-or-no question; besides, `f1_splits` for the mean over random, popular and adversarial ones."""
    items = yes_no_items(results[0], doc["answer"])
    return {**items, "f1_splits": {**items["f1"], "split": doc.get("category")}}


def mme(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """An item for `perception` or `cognition`, and for `total`."""
    pair = {"pair": str(doc["question_id"]), "category": doc["category"]}
    found = scored(read_yes_no(results[0]), normalise(doc["answer"]), **pair)
    return {"cognition" if doc["category"] in COGNITION else "perception": found, "total": found}


def mme_pair(doc: dict[str, Any]) -> str:
    """What the two questions on one image have in common."""
    return f"{doc['category']}/{doc['question_id']}"


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
    return _choice(results[0], lettered(doc["choices"]), aokvqa_target(doc))


def image(doc: dict[str, Any]) -> list[Any]:
    """The document's one image."""
    return [open_picture(doc["image"])]


def numbered(dataset: Any) -> Any:
    """MMBench with whole numbers as indices, which some copies have as text."""
    from datasets import Value

    if dataset.features["index"].dtype != "string":
        return dataset
    return dataset.cast_column("index", Value("int64"))


def mmbench_question(doc: dict[str, Any]) -> int:
    """What the rotations of one question have in common (their indices differ by millions)."""
    return int(doc["index"]) % 1_000_000


def mmbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """One rotation of a question."""
    options = {letter: doc[letter] for letter in "ABCDE" if doc.get(letter) and doc[letter] != "nan"}
    found = scored(read_choice(results[0], options), doc["answer"], question=mmbench_question(doc))
    return {"accuracy": found}


def images_only(dataset: Any) -> Any:
    """The rows of SEED-Bench that show an image, not frames of a video."""
    return dataset.filter(lambda kind: kind == "image", input_columns="data_type")


def seedbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of SEED-Bench."""
    return _choice(results[0], lettered([doc[f"choice_{c}"] for c in "abcd"]), doc["answer"].strip().upper())


def videomme(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of Video-MME, whose options are written with their letters."""
    return _choice(results[0], dict.fromkeys("ABCD"), doc["answer"].strip().upper())


def mvbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of MVBench, whose answer is one of the candidates."""
    options = lettered(doc["candidates"])
    target = next(letter for letter, text in options.items() if text == doc["answer"])
    return _choice(results[0], options, target)


def mmstar(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of MMStar, whose options are part of the question's text."""
    return _choice(results[0], dict.fromkeys("ABCD"), doc["answer"].strip().upper())


def realworldqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """A letter where the answer is one, else a word or number, exactly."""
    target = doc["answer"].strip()
    if target in tuple("ABCD"):
        options = {**dict.fromkeys("ABCD"), **dict(_LISTED.findall(doc["question"]))}
        return _choice(results[0], options, target)
    return {"accuracy": scored(normalise(results[0]), normalise(target))}


def mmmu(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice as everywhere here; open questions as lmms-eval scores them."""
    if doc["question_type"] == "multiple-choice":
        return _choice(results[0], lettered(ast.literal_eval(doc["options"])), doc["answer"])
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    target = doc["answer"]
    if target.startswith("["):
        target = ast.literal_eval(target)
    right = eval_open(target, parse_open_response(results[0]))
    return {"accuracy": {"score": float(right), "answer": results[0]}}
