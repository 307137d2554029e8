"""Metrics of the tasks of svl and of its demo, as functions of the scored answers (items) of all documents.

Items are made by svl.evaluation.answer_items. An answer that could not be read is wrong: it is never left out and never
replaced by a random choice. A metric that is not defined is NaN, never 0.

Where a metric is no plain mean, a `parts` function gives every item's share of it: they sum up to the metric, so that
standard errors and comparisons with another model can be computed sample by sample.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from svl.evaluation.answer_items import Item

# ---------------------------------------------------------------------------------------- shares of answers


def accuracy(items: Sequence[Item]) -> float:
    """Mean score."""
    return _ratio(sum(item["score"] for item in items), len(items))


def precision(items: Sequence[Item]) -> float:
    """Of the "yes" answers, the share that is right; NaN if there is none."""
    return _ratio(_hits(items), _count(items, "answer"))


def recall(items: Sequence[Item]) -> float:
    """Of the questions whose answer is yes, the share answered so: an unreadable answer is a miss."""
    return _ratio(_hits(items), _count(items, "target"))


def f1(items: Sequence[Item]) -> float:
    """Harmonic mean of precision and recall, from counts: 0 for a model that never says yes."""
    return _ratio(2 * _hits(items), _count(items, "answer") + _count(items, "target"))


def yes_ratio(items: Sequence[Item]) -> float:
    """Share of all answers that are "yes"."""
    return _ratio(_count(items, "answer"), len(items))


def precision_parts(items: Sequence[Item]) -> list[float]:
    """Shares of the precision, see `_parts_of_ratio`."""
    said = [_says(item, "answer") for item in items]
    return _parts_of_ratio([yes and _says(item, "target") for yes, item in zip(said, items, strict=True)], said)


def recall_parts(items: Sequence[Item]) -> list[float]:
    """Shares of the recall, see `_parts_of_ratio`."""
    true = [_says(item, "target") for item in items]
    return _parts_of_ratio([yes and _says(item, "answer") for yes, item in zip(true, items, strict=True)], true)


def yes_ratio_parts(items: Sequence[Item]) -> list[float]:
    """Shares of the yes-ratio, which is a mean."""
    return [_says(item, "answer") / len(items) for item in items]


def f1_parts(items: Sequence[Item]) -> list[float]:
    """Shares of the F1 score, see `_parts_of_ratio`."""
    pairs = [(_says(item, "answer"), _says(item, "target")) for item in items]
    return _parts_of_ratio([2 * (said and true) for said, true in pairs], [said + true for said, true in pairs])


def _parts_of_ratio(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Shares of sum(upper) / sum(lower): its first-order change with each item, plus an equal part of the whole."""
    whole = sum(lower)
    if not whole:
        return [math.nan] * len(lower)
    value = sum(upper) / whole
    return [value / len(lower) + (a - value * b) / whole for a, b in zip(upper, lower, strict=True)]


def f1_splits(items: Sequence[Item]) -> float:
    """Mean of the F1 scores of the splits (`split` of the items), as the LLaVA papers report POPE."""
    splits = _splits(items)
    return _ratio(math.fsum(map(f1, splits.values())), len(splits))


def f1_splits_parts(items: Sequence[Item]) -> list[float]:
    """Shares of the mean over splits: an item changes that of its own; an equal part of the whole besides."""
    splits, value = _splits(items), f1_splits(items)
    parts = {split: iter(f1_parts(found)) for split, found in splits.items()}
    equal = {split: f1(found) / len(found) for split, found in splits.items()}
    changes = ((next(parts[item["split"]]) - equal[item["split"]]) / len(splits) for item in items)
    return [value / len(items) + change for change in changes]


def _splits(items: Sequence[Item]) -> dict[Any, list[Item]]:
    splits = defaultdict(list)
    for item in items:
        splits[item["split"]].append(item)
    return splits


def count(items: Sequence[Item]) -> int:
    """How many answers the accuracy and the yes-ratio are shares of."""
    return len(items)


def count_said_yes(items: Sequence[Item]) -> int:
    """How many answers the precision is a share of."""
    return _count(items, "answer")


def count_positives(items: Sequence[Item]) -> int:
    """How many answers the recall is a share of."""
    return _count(items, "target")


def count_f1(items: Sequence[Item]) -> int:
    """How many answers the F1 score is a share of: those that are "yes", or should be."""
    return sum("yes" in (item["answer"], item["target"]) for item in items)


def _count(items: Sequence[Item], key: str) -> int:
    return sum(_says(item, key) for item in items)


def _says(item: Item, key: str) -> bool:
    return bool(item[key] == "yes")


def _hits(items: Sequence[Item]) -> int:
    return sum(item["answer"] == item["target"] == "yes" for item in items)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


# ------------------------------------------------------------------------------------------- above chance


def above_chance(items: Sequence[Item]) -> float:
    """(accuracy - chance) / (1 - chance): 0 of guesses, 1 if all is right; `chance` of an item is 1 / its options."""
    return math.fsum(above_chance_parts(items)) if items else math.nan


def above_chance_parts(items: Sequence[Item]) -> list[float]:
    """Shares of `above_chance`: how much better than a guess each answer is, by what all could be."""
    most = math.fsum(1 - item["chance"] for item in items)
    return [_ratio(item["score"] - item["chance"], most) for item in items]


# ------------------------------------------------------------------------------------------------------ MME


def mme_score(items: Sequence[Item]) -> float:
    """Sum over categories, each 0 to 200."""
    return math.fsum(mme_parts(items)) if items else math.nan


def mme_parts(items: Sequence[Item]) -> list[float]:
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


MME_CHANCE = 100 * 1 / 2 + 100 * 1 / 4  # points of guesses in a category: each answer, both of an image


def mme_above_chance(items: Sequence[Item]) -> float:
    """The MME score as a share of what is to be had above guesses: 0 of these, 1 if all is right."""
    return math.fsum(mme_above_chance_parts(items)) if items else math.nan


def mme_above_chance_parts(items: Sequence[Item]) -> list[float]:
    """Shares of `mme_above_chance`."""
    counts = Counter(item["category"] for item in items)
    most = (200 - MME_CHANCE) * len(counts)
    return [
        (points - MME_CHANCE / counts[item["category"]]) / most
        for points, item in zip(mme_parts(items), items, strict=True)
    ]


# -------------------------------------------------------------------------------------------------- MMBench


def circular_accuracy(items: Sequence[Item]) -> float:
    """CircularEval: the share of questions of which every rotation of the options is answered right."""
    return math.fsum(circular_parts(items)) if items else math.nan


def count_questions(items: Sequence[Item]) -> int:
    """How many questions the CircularEval accuracy is a share of."""
    return len({item["question"] for item in items})


def circular_parts(items: Sequence[Item]) -> list[float]:
    """Shares of the CircularEval accuracy, each rotation an equal part of its question's (`question` of the items)."""
    questions = defaultdict(list)
    for item in items:
        questions[item["question"]].append(item["score"])
    rotations = (questions[item["question"]] for item in items)
    return [float(all(scores)) / len(scores) / len(questions) for scores in rotations]


def circular_above_chance(items: Sequence[Item]) -> float:
    """`above_chance` of CircularEval, where a guess has to be right in every rotation."""
    return math.fsum(circular_above_chance_parts(items)) if items else math.nan


def circular_above_chance_parts(items: Sequence[Item]) -> list[float]:
    """Shares of `circular_above_chance`, each rotation an equal part of its question's."""
    questions: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        questions[item["question"]].append(item)
    chances = {question: math.prod(turn["chance"] for turn in turns) for question, turns in questions.items()}
    most = math.fsum(1 - chance for chance in chances.values())
    parts = []
    for item in items:
        turns = questions[item["question"]]
        is_right = all(turn["score"] for turn in turns)
        parts.append(_ratio((is_right - chances[item["question"]]) / len(turns), most))
    return parts
