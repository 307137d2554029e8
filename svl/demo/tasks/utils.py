"""Scoring of the bundled benchmarks, usable with any lmms-eval model.

`process_results` functions take a row and a list with the model's answer, and give one item per metric; aggregations
take the items of all rows (svl.evaluation.task_metrics). Answers are read by svl.evaluation.reading.
"""

from __future__ import annotations

from typing import Any

from svl.evaluation.reading import normalise, read_letter, read_yes_no
from svl.evaluation.task_metrics import (
    Item,
    accuracy,
    count,
    count_f1,
    count_positives,
    count_said_yes,
    f1,
    precision,
    recall,
    scored,
    yes_no_items,
    yes_ratio,
)

# what the YAML files name besides the functions below
__all__ = [
    "accuracy",
    "count",
    "count_f1",
    "count_positives",
    "count_said_yes",
    "f1",
    "precision",
    "recall",
    "yes_ratio",
]


def existence(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Yes-or-no question: items for accuracy, precision, recall, f1 and yes_ratio."""
    return yes_no_items(results[0], doc["answer"])


def choice(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice with lettered options: an item for accuracy."""
    return {"accuracy": scored(read_letter(results[0]), doc["answer"])}


def short_answer(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """One-word answer, exact match: items for accuracy and for the accuracy of the question's kind."""
    found = scored(normalise(results[0]), normalise(doc["answer"]))
    return {"accuracy": found, f"accuracy_{doc['kind']}": found}


def read_answer(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Yes or no, a letter or one word, read as the question's kind asks: the items of `short_answer`."""
    readers = {"existence": read_yes_no, "compare": read_yes_no, "choice": read_letter}
    read = readers.get(doc["kind"], normalise)
    return short_answer(doc, [read(results[0]) or ""])


def description(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """A list of shapes, exact match of the whole list: an item for accuracy."""
    return {"accuracy": scored(normalise(results[0]), normalise(doc["answer"]))}
