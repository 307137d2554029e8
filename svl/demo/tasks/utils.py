"""Scoring of the bundled benchmarks, usable with any lmms-eval model.

`process_results` functions take a row and a list with the model's answer, and give one item per metric with a `score`
of 0 or 1; aggregations take the items of all rows. An answer that cannot be read is wrong: it is never guessed, never
left out, and never replaced by a random choice. A metric that is not defined is NaN, never 0.
"""

from __future__ import annotations

import math
import re
from typing import Any

_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_LETTER = re.compile(r"\s*\(?\s*([A-Z])\s*(?:[).:,]|$)", re.IGNORECASE)


def read_yes_no(text: str) -> str | None:
    """ "yes" or "no" if the answer starts with that word ("Yes.", "yes, there is"), else None."""
    match = _YES_NO.match(text)
    return match[1].lower() if match else None


def read_letter(text: str) -> str | None:
    """The letter of "B", "B.", "(B)" or "B. red", upper case, else None ("a red one" is an article, not an option)."""
    match = _LETTER.match(text)
    return match[1].upper() if match else None


def normalise(text: str) -> str:
    """Lower case, without surrounding white space and the final period."""
    return text.strip().removesuffix(".").rstrip().lower()


# ------------------------------------------------------------------------------------ process_results


def existence(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Yes-or-no question: items for accuracy, precision, recall, f1 and yes_ratio."""
    answer, target = read_yes_no(results[0]), normalise(doc["answer"])
    item = {"score": float(answer == target), "answer": answer, "target": target}
    return dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), item)


def choice(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Multiple choice with lettered options: an item for accuracy."""
    answer = read_letter(results[0])
    return {"accuracy": {"score": float(answer == doc["answer"]), "answer": answer}}


def short_answer(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """One-word answer, exact match: items for accuracy and for the accuracy of the question's kind."""
    answer = normalise(results[0])
    item = {"score": float(answer == normalise(doc["answer"])), "answer": answer}
    return {"accuracy": item, f"accuracy_{doc['kind']}": item}


def read_answer(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Yes or no, a letter or one word, read as the question's kind asks: the items of `short_answer`."""
    read = {"existence": read_yes_no, "compare": read_yes_no, "choice": read_letter}.get(doc["kind"], normalise)
    return short_answer(doc, [read(results[0]) or ""])


def description(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """A list of shapes, exact match of the whole list: an item for accuracy."""
    answer = normalise(results[0])
    return {"accuracy": {"score": float(answer == normalise(doc["answer"])), "answer": answer}}


# --------------------------------------------------------------------------------------- aggregation


def accuracy(items: list[dict[str, Any]]) -> float:
    """Mean score."""
    return _ratio(sum(item["score"] for item in items), len(items))


def precision(items: list[dict[str, Any]]) -> float:
    """Of the "yes" answers, the share that is right; NaN if there is none."""
    return _ratio(_hits(items), _count(items, "answer"))


def recall(items: list[dict[str, Any]]) -> float:
    """Of the questions whose answer is yes, the share answered so: an unreadable answer is a miss."""
    return _ratio(_hits(items), _count(items, "target"))


def f1(items: list[dict[str, Any]]) -> float:
    """Harmonic mean of precision and recall, from counts: 0 for a model that never says yes."""
    return _ratio(2 * _hits(items), _count(items, "answer") + _count(items, "target"))


def yes_ratio(items: list[dict[str, Any]]) -> float:
    """Share of all answers that are "yes"."""
    return _ratio(_count(items, "answer"), len(items))


def _count(items: list[dict[str, Any]], key: str) -> int:
    return sum(item[key] == "yes" for item in items)


def _hits(items: list[dict[str, Any]]) -> int:
    return sum(item["answer"] == item["target"] == "yes" for item in items)


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
