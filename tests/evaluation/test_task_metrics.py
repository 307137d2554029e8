"""Metrics of tasks: by hand, and against lmms-eval's own where those are right."""

from __future__ import annotations

import math
import random
import statistics
from itertools import product

import pytest

from svl.demo.tasks import utils
from svl.evaluation import task_metrics
from svl.evaluation.answer_items import choice_items, yes_no_items
from svl.evaluation.score_statistics import Part, bootstrap_error, standard_error


def test_pope_metrics_by_hand():
    # 4 positives: yes, yes, no, garbage; 4 negatives: no, yes, garbage, garbage
    said = ["Yes.", "yes, there is", "no", "blue", "No", "yes", "", "yesterday"]
    targets = ["yes"] * 4 + ["no"] * 4
    items = [yes_no_items(text, target)["f1"] for text, target in zip(said, targets, strict=True)]
    assert task_metrics.accuracy(items) == 3 / 8
    assert task_metrics.precision(items) == 2 / 3
    assert task_metrics.recall(items) == 2 / 4  # garbage is a miss
    assert task_metrics.f1(items) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert task_metrics.yes_ratio(items) == 3 / 8


def test_undefined_metrics_are_nan():
    never = [yes_no_items("no", target)["f1"] for target in ("yes", "no")]
    assert math.isnan(task_metrics.precision(never))
    assert (task_metrics.recall(never), task_metrics.f1(never), task_metrics.yes_ratio(never)) == (0, 0, 0)
    assert math.isnan(task_metrics.recall(never[1:]))
    none = ("accuracy", "mme_score", "circular_accuracy", "f1_splits", "yes_ratio", "above_chance")
    assert all(math.isnan(getattr(task_metrics, name)([])) for name in none)
    sure = [{"score": 1.0, "chance": 1.0, "question": 1}]  # questions with one option
    assert math.isnan(task_metrics.above_chance(sure))
    assert math.isnan(task_metrics.circular_above_chance(sure))


def test_choice_and_short_answers_by_hand():
    options = ["red", "blue"]
    found = [utils.choice({"answer": "B", "options": options}, [t])["accuracy"]["score"] for t in ("(b)", "C", "red")]
    assert found == [1, 0, 0]
    doc = {"answer": "red", "kind": "relation1"}
    scores = [utils.short_answer(doc, [t]) for t in ("Red.", " red ", "red circle", "circle", "")]
    assert [s["accuracy"]["score"] for s in scores] == [1, 1, 1, 0, 0]  # it runs on, but says so
    assert [s["off_format"]["score"] for s in scores] == [0, 0, 1, 0, 0]
    assert all(s["accuracy_relation1"] == s["accuracy"] for s in scores)


def test_mme_is_scored_as_by_lmms_eval():
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    chance = random.Random(0)
    questions = [(c, f"{i}") for c, n in (("OCR", 2), ("count", 7), ("scene", 30)) for i in range(n) for _ in "ab"]
    items = [{"score": float(chance.random() < 0.6), "category": c, "pair": i} for c, i in questions]
    upstream = mme_aggregate_results([{**item, "question_id": item["pair"]} for item in items])
    assert task_metrics.mme_score(items) == pytest.approx(upstream)


@pytest.mark.parametrize("metric", ["f1", "f1_splits", "precision", "recall", "yes_ratio"])
def test_parts_of_ratios_sum_up_to_them_and_give_their_errors(metric):
    """Against a bootstrap; of the mean over splits, one that draws within each, as their sizes are no chance."""
    chance = random.Random(0)
    items = [
        {"answer": chance.choice(["yes", "no", None]), "target": chance.choice(["yes", "no"]), "split": "abb"[i % 3]}
        for i in range(90)
    ]
    aggregate = getattr(task_metrics, metric)
    parts = getattr(task_metrics, f"{metric}_parts")(items)
    assert sum(parts) == pytest.approx(aggregate(items))
    error = standard_error(Part(part, i) for i, part in enumerate(parts))
    draws = []
    for _ in range(1000):
        drawn = [chance.choices([item for item in items if item["split"] == split], k=30 * n) for split, n in SPLITS]
        draws.append(aggregate([item for part in drawn for item in part]))
    assert error == pytest.approx(statistics.stdev(draws), rel=0.1)


SPLITS = (("a", 1), ("b", 2))


def test_parts_of_what_is_undefined_are_nan():
    never = [{"answer": "no", "target": "no"}] * 2
    for metric in ("f1", "precision", "recall"):
        assert all(math.isnan(part) for part in getattr(task_metrics, f"{metric}_parts")(never))


def test_parts_of_rotations_sum_up_to_whole_questions():
    chance = random.Random(1)
    rotations = [{"question": i // 4, "score": float(chance.random() < 0.9)} for i in range(40)]
    right = [float(all(r["score"] for r in rotations[i : i + 4])) for i in range(0, 40, 4)]
    assert task_metrics.circular_accuracy(rotations) == pytest.approx(statistics.fmean(right))
    parts = zip(task_metrics.circular_parts(rotations), rotations, strict=True)
    error = standard_error(Part(part, rotation["question"]) for part, rotation in parts)
    assert error == pytest.approx(statistics.stdev(right) / 10**0.5)


def test_the_share_of_answers_that_lost_the_form():
    said = {"yes": 0, "Yes.": 0, "**Yes**": 1, "Yes, it is": 1, "Yes\nNo": 1, "red": 0, "": 0}  # the last two: unread
    items = [yes_no_items(text, "yes")["off_format"] for text in said]
    assert [item["score"] for item in items] == list(said.values())
    assert task_metrics.accuracy(items) == pytest.approx(3 / 7)


def test_above_chance_by_hand():
    """Guesses come to 0 and all right to 1, whatever the numbers of options; the rest lies on the line between."""
    options = [dict.fromkeys("ABCDE"[:n]) for n in (2, 3, 4, 5)]
    right = [choice_items("A", o, "A")["above_chance"] for o in options]
    wrong = [choice_items("B", o, "A")["above_chance"] for o in options]
    chance = statistics.fmean(1 / n for n in (2, 3, 4, 5))
    assert task_metrics.above_chance(right) == pytest.approx(1)
    assert task_metrics.above_chance(wrong) == pytest.approx(-chance / (1 - chance))
    assert task_metrics.above_chance([*right, *wrong]) == pytest.approx((0.5 - chance) / (1 - chance))
    guesses = [right[i] if k < 60 // n else wrong[i] for i, n in enumerate((2, 3, 4, 5)) for k in range(60)]
    assert task_metrics.above_chance(guesses) == pytest.approx(0)
    assert math.isnan(task_metrics.above_chance([]))
    assert math.isnan(task_metrics.mme_above_chance([]))
    assert math.isnan(task_metrics.circular_above_chance([]))


def test_errors_above_chance_are_those_of_accuracy_by_what_is_left():
    chance = random.Random(3)
    items = [{"score": float(chance.random() < 0.6), "chance": 1 / 4} for _ in range(80)]
    found = standard_error(Part(part, i) for i, part in enumerate(task_metrics.above_chance_parts(items)))
    plain = statistics.stdev(item["score"] for item in items) / 80**0.5
    assert found == pytest.approx(plain / (1 - 1 / 4))
    assert found == pytest.approx(
        bootstrap_error(task_metrics.above_chance(items), items, range(80), task_metrics.above_chance), rel=0.15
    )


def test_guesses_in_mme_and_in_rotations_come_to_nothing():
    """Over all ways to guess (each as likely), the mean is 0; all right is 1."""
    ways = [
        [{"score": float(s), "category": "count", "pair": "1"} for s in scores] for scores in product((0, 1), repeat=2)
    ]
    assert statistics.fmean(map(task_metrics.mme_above_chance, ways)) == pytest.approx(0)
    assert task_metrics.mme_above_chance(ways[-1]) == pytest.approx(1)
    two = [dict(item, category=name) for name in ("count", "scene") for item in ways[-1]]
    assert task_metrics.mme_above_chance(two) == pytest.approx(1)
    guesses = [
        [{"score": float(right == 0), "question": 1, "chance": 1 / 3} for right in rights]
        for rights in product(range(3), repeat=3)
    ]
    assert statistics.fmean(map(task_metrics.circular_above_chance, guesses)) == pytest.approx(0)
    assert task_metrics.circular_above_chance(guesses[0]) == pytest.approx(1)
    mixed = [*guesses[0], *({"score": 1.0, "question": 2, "chance": 1 / 2} for _ in "ab")]
    assert sum(task_metrics.circular_above_chance_parts(mixed)) == pytest.approx(1)
