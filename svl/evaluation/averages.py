"""Averages over benchmarks: of which there are any, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svl.evaluation.score_statistics import NORMAL_95

Metric = Mapping[str, Any]  # "value", "stderr", "low", "high", "dense"


def average_problem(scores: Mapping[str, Mapping[str, Any]], scales: Mapping[str, float]) -> str | None:
    """Why the mean over tasks of main metric / scale would mean nothing, or None.

    Args:
        scores: of a result, by task: `metric`, `metrics`, `higher_is_better` (True where it is not told).
        scales: by task, what its main metric is divided by; 1 where none is given.
    """
    lower = {task: score["metric"] for task, score in scores.items() if not score.get("higher_is_better", True)}
    higher = {task: score["metric"] for task, score in scores.items() if task not in lower}
    if lower and higher:
        return f"lower values are better of {_named(lower)}, higher ones of {_named(higher)}"
    if len(set(lower.values())) > 1:
        return f"losses of several kinds: {_named(lower)}"
    beyond = {task: metric for task, metric in higher.items() if _goes_beyond_1(scores[task], scales.get(task, 1.0))}
    within = {task: metric for task, metric in higher.items() if task not in beyond}
    if beyond and within:
        return (
            f"{_named(beyond)} goes beyond 1, {_named(within)} does not: benchmark.tasks.<task>.scale is what a main "
            "metric is divided by"
        )
    return None


def _named(metrics: Mapping[str, str]) -> str:
    return ", ".join(f"{task} ({metric})" for task, metric in metrics.items())


def _goes_beyond_1(score: Mapping[str, Any], scale: float) -> bool:
    """Whether the main metric of either model, divided by its scale, is more than a share of something can be."""
    main = score["metrics"][score["metric"]]
    values = [value for name in ("value", "dense") if (value := main.get(name)) is not None]
    return any(abs(value) / scale > 1 + 1e-9 for value in values)


def mean_value(values: Sequence[float | None], scales: Iterable[float]) -> float | None:
    """Mean of task scores by their scales; None without tasks, or if one is undefined."""
    known = [value / scale for value, scale in zip(values, scales, strict=True) if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def mean_error(errors: Sequence[float | None], scales: Iterable[float]) -> float | None:
    """Standard error of a mean of independent task scores; None without tasks, or if one is unknown."""
    known = [error / scale for error, scale in zip(errors, scales, strict=True) if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.sqrt(sum(error * error for error in known)) / len(known)


def metric_error(metric: Metric | None) -> float | None:
    """Standard error of a metric, None where unknown (never 0: then samples say nothing about it).

    Where all answers are right, or all wrong, they have no deviation: the error is that of the 95 % interval.
    """
    error, low, high = ((metric or {}).get(name) for name in ("stderr", "low", "high"))
    if error:
        return float(error)
    return (high - low) / (2 * NORMAL_95) if low is not None and high is not None else None
