"""A run's result: averages of what is measured beside the main metrics."""

from __future__ import annotations

import pytest

from svl.run.run_result import averages_beside


def metric(value: float | None, stderr: float | None, dense: float) -> dict[str, float | None]:
    return {"value": value, "stderr": stderr, "dense": dense}


def test_averages_beside_are_over_the_tasks_that_have_them():
    all_keep = {**metric(0.2, 0.0, 0.2), "low": 0.2, "high": 0.2 + 2 * 1.959964 * 0.12}  # its interval alone tells
    scores = {
        "mme": {
            "metric": "perception",
            "metrics": {
                "perception": metric(1200, 20, 1500),
                "likelihood_perception": metric(1400, 40, 1600),
                "above_chance": metric(0.4, 0.04, 0.6),
                "off_format": metric(0.1, 0.03, 0.0),
            },
        },
        "choice": {
            "metric": "accuracy",
            "metrics": {
                "accuracy": metric(0.5, 0.02, 0.8),
                "likelihood_accuracy": metric(0.6, 0.02, 0.8),
                "above_chance": metric(0.2, 0.03, 0.7),
                "off_format": metric(0.3, 0.04, 0.1),
            },
        },
        "open": {"metric": "anls", "metrics": {"anls": metric(0.5, 0.01, 0.6), "off_format": all_keep}},
        "prose": {"metric": "loss", "metrics": {"loss": metric(4.0, 0.1, 3.0)}},
    }
    found = averages_beside(scores, {"mme": 2000, "choice": 1, "open": 1, "prose": 1})
    assert found["likelihood"] == pytest.approx({"value": (0.7 + 0.6) / 2, "stderr": 0.02 / 2**0.5, "dense": 0.8})
    assert found["above_chance"] == pytest.approx({"value": 0.3, "stderr": 0.025, "dense": 0.65})
    assert found["off_format"] == pytest.approx({"value": 0.2, "stderr": 0.13 / 3, "dense": 0.1})
    assert averages_beside({"prose": scores["prose"]}, {"prose": 1}) == {}


def test_an_undefined_part_leaves_an_average_undefined():
    scores = {
        name: {"metric": "accuracy", "metrics": {"accuracy": metric(1, 0, 1), "above_chance": metric(value, None, 0.5)}}
        for name, value in (("a", 0.5), ("b", None))
    }
    assert averages_beside(scores, {"a": 1, "b": 1}) == {"above_chance": {"value": None, "stderr": None, "dense": 0.5}}
