"""Averages over benchmarks: which there are, and how sure they are."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from svl.evaluation.averages import average_problem, metric_error
from svl.evaluation.score_statistics import share_interval
from svl.run import run_result
from svl.store.artifacts import Entry


def score(metric: str, value: float | None, dense: float, higher: bool = True) -> dict[str, Any]:
    return {"metric": metric, "metrics": {metric: {"value": value, "dense": dense}}, "higher_is_better": higher}


@pytest.mark.parametrize(
    ("scores", "scales", "problem"),
    [
        ([score("accuracy", 0.5, 0.9), score("f1", 0.4, 0.8)], (1, 1), None),
        ([score("loss", 3.0, 2.0, False), score("loss", 0.9, 0.8, False)], (1, 1), None),
        ([score("perception", 900, 1500), score("f1", 0.4, 0.8)], (2000, 1), None),
        ([score("cider", 40, 110), score("bleu", 30, 50)], (1, 1), None),
        ([score("accuracy", None, 0.9), score("f1", 0.4, 0.8)], (1, 1), None),
        ([score("perception", 900, 1500)], (1,), None),
        ([score("accuracy", 0.5, 0.9), score("loss", 3.0, 2.0, False)], (1, 1), r"b \(loss\), higher ones of a \(acc"),
        ([score("accuracy", 0.5, 0.9), score("off_format", 0.1, 0.2, False)], (1, 1), "lower values are better of b"),
        ([score("loss", 3.0, 2.0, False), score("perplexity", 20.0, 7.4, False)], (1, 1), "losses of several kinds"),
        ([score("perception", 900, 1500), score("f1", 0.4, 0.8)], (1, 1), r"a \(perception\) goes beyond 1, b"),
        ([score("perception", 0.0, 1500), score("f1", 0.4, 0.8)], (1, 1), r"benchmark\.tasks\.<task>\.scale"),
    ],
)
def test_what_has_no_common_scale_has_no_average(scores, scales, problem):
    names = "abc"[: len(scores)]
    found = average_problem(dict(zip(names, scores, strict=True)), dict(zip(names, scales, strict=True)))
    if problem is None:
        assert found is None
    else:
        assert re.search(problem, found or "")


def scored(folder: Path, scores: list[float], higher: bool = True) -> Entry:
    """The score of right (1) and wrong (0) answers, as it is stored."""
    folder.mkdir(parents=True)
    rows = [{"doc_id": i, "question": "", "target": "", "prediction": s, "score": s} for i, s in enumerate(scores)]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    n, mean = len(scores), sum(scores) / len(scores)
    stderr = math.sqrt(mean * (1 - mean) / (n - 1))
    low, high = share_interval(mean, stderr, n, n)
    metrics = {"accuracy": {"value": mean, "stderr": stderr, "low": low, "high": high}}
    output = {"metric": "accuracy", "n": n, "metrics": metrics, "limit": None, "higher_is_better": higher}
    return Entry(folder, {"output": output})


def summary(folder: Path, **tasks: Entry) -> dict[str, Any]:
    return run_result.summarise(tasks, tasks, dict.fromkeys(tasks, 1.0))


def test_an_average_of_losses_and_scores_is_none_and_says_why(tmp_path):
    right, lower = scored(tmp_path / "a", [1.0, 0.0]), scored(tmp_path / "b", [1.0, 0.0], higher=False)
    found = summary(tmp_path, a=right, b=lower)
    assert (found["average"], found["retained"]) == (None, None)
    assert found["average_note"].startswith("lower values are better of b (accuracy)")
    found = summary(tmp_path, a=right)
    assert (found["average"]["value"], found["average_note"]) == (0.5, None)


def test_a_task_with_all_answers_right_adds_its_interval_to_the_error_of_an_average(tmp_path):
    """The very half-width that is shown as the task's own error."""
    sure, unsure = scored(tmp_path / "a", [1.0] * 20), scored(tmp_path / "b", [1.0, 0.0] * 20)
    low = 1 / (1 + 1.959964**2 / 20)  # Wilson's lower end of 20 of 20
    assert metric_error(sure.output["metrics"]["accuracy"]) == pytest.approx((1 - low) / (2 * 1.959964), abs=1e-4)
    error = summary(tmp_path, a=sure, b=unsure)["average"]["stderr"]
    parts = [metric_error(entry.output["metrics"]["accuracy"]) for entry in (sure, unsure)]
    assert error == pytest.approx(math.hypot(*parts) / 2)
    assert metric_error({"value": 1.0, "stderr": 0.0}) is None  # never 0
