"""Scoring of the bundled benchmarks, usable with any lmms-eval model.

`process_results` functions take a row and a list with the model's answer, and give one item per metric
(svl.evaluation.answer_items); aggregations take the items of all rows (svl.evaluation.task_metrics). Answers are read
by svl.evaluation.reading. `options` gives what a closed question may be answered with.
"""

from __future__ import annotations

from typing import Any

from svl.evaluation.answer_items import (
    Item,
    choice_items,
    lettered,
    listed_options,
    short_items,
    word_items,
    yes_no_items,
)
from svl.evaluation.task_metrics import (
    above_chance,
    above_chance_parts,
    accuracy,
    count,
    count_f1,
    count_positives,
    count_said_yes,
    f1,
    f1_parts,
    precision,
    precision_parts,
    recall,
    recall_parts,
    yes_ratio,
    yes_ratio_parts,
)

# what the YAML files name besides the functions below
__all__ = [
    "above_chance",
    "above_chance_parts",
    "accuracy",
    "count",
    "count_f1",
    "count_positives",
    "count_said_yes",
    "f1",
    "f1_parts",
    "precision",
    "precision_parts",
    "recall",
    "recall_parts",
    "yes_ratio",
    "yes_ratio_parts",
]


def existence(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Yes-or-no question: items for accuracy, precision, recall, f1, yes_ratio, above_chance and off_format."""
    return yes_no_items(results[0], doc["answer"])


def choice(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice with lettered options: items for accuracy, above_chance and off_format."""
    return choice_items(results[0], lettered(doc["options"]), doc["answer"])


def short_answer(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """One word, the first; yes or no where that is asked: items for accuracy, that of the kind, and the form."""
    return _with_kind(doc, _yes_no(doc, results) or word_items(results[0], doc["answer"]))


def read_answer(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Yes or no, a letter or one word, read as the question's kind asks: the items of `short_answer`."""
    if doc["kind"] == "choice":
        return _with_kind(doc, choice_items(results[0], listed_options(doc["prompt"]), doc["answer"]))
    return short_answer(doc, results)


def description(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """A list of shapes, exact match of the whole list: items for accuracy and off_format."""
    return short_items(results[0], doc["answer"])


def options(doc: dict[str, Any]) -> list[str]:
    """What a closed question may be answered with: yes or no, or the letters that it lists."""
    if doc["answer"] in ("yes", "no"):
        return ["yes", "no"]
    return list(listed_options(doc["prompt"]))


def _yes_no(doc: dict[str, Any], results: list[str]) -> dict[str, Item] | None:
    """The items of a yes-or-no question that count in a task with other questions, too; None of another question."""
    if doc["answer"] not in ("yes", "no"):
        return None
    found = yes_no_items(results[0], doc["answer"])
    return {name: found[name] for name in ("accuracy", "above_chance", "off_format")}


def _with_kind(doc: dict[str, Any], items: dict[str, Item]) -> dict[str, Item]:
    """Items with one for the accuracy of the question's kind."""
    return {**items, f"accuracy_{doc['kind']}": items["accuracy"]}
