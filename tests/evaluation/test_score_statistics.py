"""Standard errors and comparisons of two models, against libraries, resampling and worked examples."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from svl.evaluation import score_statistics, task_metrics
from svl.evaluation.score_statistics import Part, bootstrap_error, share_interval, standard_error
from svl.report import flips_page, paired_tests
from svl.run import run_result
from svl.store.artifacts import Entry

SCORES = [1.0, 0.0, 1.0, 1.0]


def mean_error(values: list[float]) -> float | None:
    """Standard error of a mean of independent values."""
    return standard_error(Part(value / len(values), i) for i, value in enumerate(values))


def test_the_error_of_a_mean():
    assert mean_error(SCORES) == pytest.approx(statistics.stdev(SCORES) / 2)
    assert mean_error(SCORES[:1]) is None
    assert mean_error([]) is None


def test_two_questions_on_one_image_say_no_more_than_one_does():
    doubled = standard_error(Part(score / 8, i) for i, score in enumerate(SCORES) for _ in "ab")
    assert doubled == pytest.approx(mean_error(SCORES))


def test_a_sum_over_strata_has_the_errors_of_the_strata():
    split = standard_error(Part(score / 4, i, i // 4) for i, score in enumerate(SCORES * 2))
    assert split == pytest.approx(math.sqrt(2) * mean_error(SCORES))


def test_the_bootstrap_is_that_of_scipy_and_repeats():
    items = [{"score": score} for score in SCORES * 50]
    error = bootstrap_error(0.75, items, range(200), task_metrics.accuracy)
    assert error == bootstrap_error(0.75, items, range(200), task_metrics.accuracy)
    scipys = stats.bootstrap((np.array(SCORES * 50),), np.mean, n_resamples=2000, rng=np.random.default_rng(0))
    assert error == pytest.approx(scipys.standard_error, rel=0.15)
    assert bootstrap_error(math.nan, items, range(200), task_metrics.accuracy) is None


def test_the_bootstrap_draws_units():
    """Four questions on one image that are all right or all wrong say as much as one does."""
    items = [{"score": score} for score in SCORES * 12 for _ in range(4)]
    images = [i // 4 for i in range(len(items))]
    once = bootstrap_error(0.75, items[::4], range(48), task_metrics.accuracy)
    assert bootstrap_error(0.75, items, images, task_metrics.accuracy) == pytest.approx(once)
    assert bootstrap_error(0.75, items, range(len(items)), task_metrics.accuracy) < 0.6 * once


@given(st.integers(1, 500), st.data())
def test_intervals_are_wilsons_and_stay_within_0_and_1(n, data):
    right = data.draw(st.integers(0, n))
    share = right / n
    error = standard_error(Part(float(i < right) / n, i) for i in range(n))
    low, high = share_interval(share, error, n, n)
    reference = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-6)
    assert 0 <= low <= share <= high <= 1
    assert high - low > 0


def test_intervals_are_as_wide_as_those_of_units():
    """40 images, on each five questions that are all right or all wrong: as 40 questions; all right: the same."""
    scores = [float(image < 30) for image in range(40) for _ in range(5)]
    error = standard_error(Part(score / 200, i // 5) for i, score in enumerate(scores))
    reference = stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert share_interval(0.75, error, 200, 40) == pytest.approx((reference.low, reference.high), abs=1e-6)
    reference = stats.binomtest(40, 40).proportion_ci(method="wilson")
    assert share_interval(1.0, 0.0, 200, 40) == pytest.approx((reference.low, reference.high), abs=1e-6)
    assert share_interval(0.0, None, 0, 0) == (0, 1)


# ----------------------------------------------------------------------------------------------- comparing


def scored(folder: Path, rows: list[dict[str, Any]], value: float) -> Entry:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = {"accuracy": {"value": value, "stderr": 0.1}}
    output = {"metric": "accuracy", "n": len(rows), "metrics": metrics, "limit": None}
    return Entry(folder, {"output": output})


def answers(scores: list[float], words: str = "ab") -> list[dict[str, Any]]:
    return [
        {"doc_id": i, "question": f"q|{i}\n<x>", "target": "t", "prediction": words[int(s)], "score": s}
        for i, s in enumerate(scores)
    ]


@pytest.fixture
def pair(tmp_path) -> tuple[Entry, Entry, list[float], list[float]]:
    """A pruned and a dense model's scores of 400 questions, as artifacts and as numbers."""
    chance = random.Random(1)
    dense = [float(chance.random() < 0.8) for _ in range(400)]
    pruned = [s if chance.random() < 0.9 else 1 - s for s in dense]
    one = scored(tmp_path / "one", answers(pruned), statistics.fmean(pruned))
    other = scored(tmp_path / "other", answers(dense), statistics.fmean(dense))
    return one, other, pruned, dense


def test_two_models_are_compared_question_by_question(pair):
    one, other, pruned, dense = pair
    change = score_statistics.compare_answers(one, other)
    assert change["gained"] == sum(a > b for a, b in zip(pruned, dense, strict=True))
    assert change["lost"] == sum(a < b for a, b in zip(pruned, dense, strict=True))
    assert change["agreement"] == 1 - (change["gained"] + change["lost"]) / 400
    assert change["p"] == pytest.approx(stats.binomtest(change["lost"], change["gained"] + change["lost"]).pvalue)


def test_the_error_of_the_retained_share_is_that_of_resampled_questions(pair):
    one, other, pruned, dense = pair
    share = statistics.fmean(pruned) / statistics.fmean(dense)
    chance, resampled = random.Random(2), []
    for _ in range(1000):
        chosen = chance.choices(range(400), k=400)
        resampled.append(sum(pruned[i] for i in chosen) / sum(dense[i] for i in chosen))
    error = score_statistics.change_error(one, other, share) / statistics.fmean(dense)
    assert error == pytest.approx(statistics.stdev(resampled), rel=0.15)
    retained = run_result.summarise({"t": one}, {"t": other}, {"t": 1.0})["retained"]
    assert retained == {"value": pytest.approx(share), "stderr": pytest.approx(error)}


def of_metric(folder: Path, said: list[str], metric: str, parts: bool = True) -> Entry:
    """Scores of answers to 200 questions, of which every other one is rightly answered by yes."""
    items = [{"answer": answer, "target": "yes" if i % 2 else "no"} for i, answer in enumerate(said)]
    rows = answers([float(item["answer"] == item["target"]) for item in items])
    value = getattr(task_metrics, metric)(items)
    if parts:
        shares = getattr(task_metrics, f"{metric}_parts")(items)
        rows = [{**row, "part": share, "stratum": None} for row, share in zip(rows, shares, strict=True)]
    entry = scored(folder, rows, value)
    entry.output.update(metric=metric, metrics={metric: {"value": value, "stderr": 0.1}})
    return entry


@pytest.mark.parametrize("metric", ["recall", "precision", "f1", "yes_ratio"])
def test_the_error_of_a_change_is_that_of_the_metric(tmp_path, metric):
    """Against resampled questions, of metrics that are no mean of right answers."""
    chance = random.Random(1)
    dense = [chance.choice(["yes", "yes", "no"]) for _ in range(200)]
    pruned = [answer if chance.random() < 0.8 else chance.choice(["yes", "no"]) for answer in dense]
    one, other = of_metric(tmp_path / "one", pruned, metric), of_metric(tmp_path / "other", dense, metric)
    resampled = []
    for _ in range(1000):
        drawn = chance.choices(range(200), k=200)
        values = [
            getattr(task_metrics, metric)([{"answer": said[i], "target": "yes" if i % 2 else "no"} for i in drawn])
            for said in (pruned, dense)
        ]
        resampled.append(values[0] - values[1])
    assert score_statistics.change_error(one, other) == pytest.approx(statistics.stdev(resampled), rel=0.15)


def test_without_parts_nothing_is_paired(tmp_path):
    """Neither where lines say so, nor in stored ones from before they did, whose mean is not the metric."""
    chance = random.Random(2)
    said = [[chance.choice(["yes", "no"]) for _ in range(200)] for _ in range(2)]
    old = [of_metric(tmp_path / f"old{i}", words, "recall", parts=False) for i, words in enumerate(said)]
    new = [of_metric(tmp_path / f"new{i}", words, "recall", parts=False) for i, words in enumerate(said)]
    for entry in new:
        file = entry.path / "samples.jsonl"
        rows = [{**json.loads(line), "part": None} for line in file.read_text().splitlines()]
        file.write_text("\n".join(map(json.dumps, rows)))
    for pair in (old, new):
        assert score_statistics.question_parts(pair[0]) is None
        assert score_statistics.change_error(*pair) is None
        assert paired_tests.paired_changes(pair[:1], pair[1:]) is None
    assert score_statistics.compare_answers(*new)["p"] is None
    assert "McNemar" not in flips_page.flips_page({"t": tuple(new)}, ("a", "b"))


def test_flipped_answers_are_shown_safely(pair):
    one, other, *_ = pair
    change = score_statistics.compare_answers(one, other)
    page = flips_page.flips_page({"t": (one, other)}, ("pruned", "dense"), most=3)
    assert f"right only in pruned: {change['gained']}, only in dense: {change['lost']}" in page
    assert page.count("q\\|") == 6
    assert f"and {change['lost'] - 3} more" in page
    assert "<x>" not in page
    assert all(line.count(" | ") == 4 for line in page.splitlines() if line.startswith("| ") and "q\\|" in line)


def test_mcnemar_by_hand():
    assert score_statistics.mcnemar(0, 0) == score_statistics.mcnemar(5, 5) == 1
    assert score_statistics.mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert score_statistics.mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert 0 < score_statistics.mcnemar(900, 1200) < 1e-9


def test_questions_outside_the_main_metric_do_not_count(tmp_path):
    rows = [*answers([1, 0, 1]), {"doc_id": 9, "question": "", "target": "", "prediction": "", "score": None}]
    one, other = scored(tmp_path / "one", rows, 2 / 3), scored(tmp_path / "other", answers([1, 1, 1]), 1.0)
    assert score_statistics.compare_answers(one, other)["lost"] == 1
    assert score_statistics.change_error(one, other) == pytest.approx(1 / 3)


def in_units(scores: list[float], size: int, parts: list[float] | None = None) -> list[dict[str, Any]]:
    """Lines of questions, each `size` of which are of one unit; with parts in a metric that is no mean."""
    rows = [{**row, "unit": str(i // size)} for i, row in enumerate(answers(scores))]
    return [{**row, "part": part} for row, part in zip(rows, parts, strict=True)] if parts else rows


def compared(folder: Path, pruned: list[dict[str, Any]], dense: list[dict[str, Any]], **output: Any) -> dict[str, Any]:
    """The comparison of two models' lines."""
    entries = [scored(folder / name, rows, 0.5) for name, rows in (("pruned", pruned), ("dense", dense))]
    for entry in entries:
        entry.output.update(output)
    return score_statistics.compare_answers(*entries)


def test_rotations_of_a_question_are_tested_as_one(tmp_path):
    """Five questions of MMBench gained, in all their rotations: five throws of a coin, not twenty."""
    pruned, dense = [1.0] * 20 + [0.0] * 4, [0.0] * 24
    change = compared(tmp_path, in_units(pruned, 4), in_units(dense, 4))
    assert (change["gained"], change["lost"]) == (20, 0)
    assert (change["units_gained"], change["units_lost"]) == (5, 0)
    assert change["p"] == pytest.approx(2 / 2**5)


def test_what_is_scored_together_counts_once_the_metric_changes(tmp_path):
    """A question whose fourth rotation becomes right is gained; one that goes from one to two right is not."""
    pruned, dense = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    parts = [
        task_metrics.circular_parts([{"question": i // 4, "score": score} for i, score in enumerate(scores)])
        for scores in (pruned, dense)
    ]
    rows = in_units(pruned, 4, parts[0]), in_units(dense, 4, parts[1])
    change = compared(tmp_path, *rows, scored_together=True)
    assert (change["gained"], change["units_gained"], change["units_lost"]) == (2, 1, 0)


def test_questions_on_one_image_are_tested_as_one(tmp_path):
    """Gained and lost on one image is neither; three gained on one image are one throw."""
    pruned, dense = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    change = compared(tmp_path, in_units(pruned, 3), in_units(dense, 3))
    assert (change["gained"], change["lost"]) == (4, 1)
    assert (change["units_gained"], change["units_lost"], change["p"]) == (1, 0, 1)


def test_scores_of_other_devices_or_batches_are_named(tmp_path):
    one, other = (scored(tmp_path / name, answers([1, 0]), 0.5) for name in ("one", "other"))
    one.output["device"] = {"type": "cpu", "name": "x86_64, 2 threads", "batch_size": 8}
    other.output["device"] = {**one.output["device"], "batch_size": 16}
    note = score_statistics.compare_answers(one, other)["note"]
    assert "cpu (x86_64, 2 threads), batches of 8" in note
    assert "batches of 16" in note
    other.output["device"] = dict(one.output["device"])
    assert score_statistics.compare_answers(one, other)["note"] is None
