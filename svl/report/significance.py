"""Whether one row is better than another beyond chance: paired by question where the answers are stored."""

from __future__ import annotations

import math
import statistics

from svl.evaluation import score_statistics
from svl.report.results import Run, stored_scores
from svl.report.rows import NORMAL_95, Row
from svl.store.artifacts import Store


def is_significantly_different(store: Store, first: Row, second: Row, task: str | None) -> bool | None:
    """Whether two rows differ in a benchmark (None: the average over all) with 95 % confidence; None if unknown.

    Two single runs are compared question by question, like the errors of scores by unit and stratum. Where answers
    are not stored, or rows are samples over seeds, the errors of both count as independent.
    """
    ours, theirs = first.score(task), second.score(task)
    if ours.value is None or theirs.value is None:
        return None
    error = None
    if len(first.runs) == len(second.runs) == 1:
        error = _paired_error(store, first.first, second.first, task)
    if error is None:
        error = _independent_error(first, second, task)
    return None if error is None else abs(ours.value - theirs.value) > NORMAL_95 * error


def _paired_error(store: Store, first: Run, second: Run, task: str | None) -> float | None:
    """Standard error of the difference of two runs, from pairs of answers to the same question."""
    if task is None and len(first.tasks) > 1:
        return None if _has_scales(first) else _average_error(store, first, second)
    name = task or first.tasks[0]
    ours, theirs = stored_scores(store, first).get(name), stored_scores(store, second).get(name)
    return score_statistics.change_error(ours, theirs) if ours and theirs else None


def _has_scales(run: Run) -> bool:
    """Whether the average divides main metrics by scales, which a result does not tell."""
    values = [run.main_metric(task).get("value") for task in run.tasks]
    average = run.main_metric(None).get("value")
    known = [value for value in values if value is not None]
    return len(known) < len(values) or not math.isclose(statistics.fmean(known), average or 0.0, rel_tol=1e-6)


def _average_error(store: Store, first: Run, second: Run) -> float | None:
    """That of the difference of two averages over independent benchmarks."""
    errors = [_paired_error(store, first, second, task) for task in first.tasks]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def _independent_error(first: Row, second: Row, task: str | None) -> float | None:
    """Standard error of the difference of two rows as if they had nothing in common."""
    errors = []
    for row in (first, second):
        error = row.score(task).error
        if error is None:
            return None
        errors.append(error / math.sqrt(len(row.runs)))  # over seeds, of their mean
    return math.hypot(*errors)
