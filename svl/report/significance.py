"""Whether one row is better than another beyond chance: paired by question where the answers are stored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from svl.evaluation.score_statistics import Part, standard_error
from svl.report.paired_tests import paired_changes, paired_p
from svl.report.results import Run, stored_scores
from svl.report.rows import Row
from svl.store.artifacts import Store

LEVEL = 0.05


def is_significantly_different(store: Store, first: Row, second: Row, task: str | None) -> bool | None:
    """Whether two rows differ in a benchmark (None: the average over all) at LEVEL; None if unknown."""
    p = difference_p(store, first, second, task)
    return None if p is None else p < LEVEL


def difference_p(store: Store, first: Row, second: Row, task: str | None) -> float | None:
    """Two-sided p-value of the difference of two rows in a benchmark (None: the average over all); None if unknown.

    Two single runs: a permutation test of their answers question by question (right or wrong: McNemar's). A row over
    seeds: all its runs count, paired with all of the other's by their mean; the difference's variance is that over the
    questions, paired, and that over the seeds of either row, and its degrees of freedom are those of their sum (Welch
    and Satterthwaite): two or three seeds prove little. Where answers are not stored, the errors over the questions
    count as independent.
    """
    ours, theirs = first.score(task), second.score(task)
    if ours.value is None or theirs.value is None:
        return None
    changes = _changes(store, first, second, task)
    if changes and len(first.runs) == len(second.runs) == 1:
        return paired_p(changes)
    questions = standard_error(changes) if changes else None
    if questions is None:
        if ours.questions is None or theirs.questions is None:
            return None
        questions = math.hypot(ours.questions, theirs.questions)
    n = len({part.unit for part in changes}) if changes else math.inf
    parts = [(questions**2, n - 1)]
    for row, estimate in ((first, ours), (second, theirs)):
        if estimate.draws is not None:
            parts.append((estimate.draws**2, len(row.runs) - 1))
    return _t_test(ours.value - theirs.value, parts)


def _t_test(difference: float, parts: list[tuple[float, float]]) -> float:
    """Two-sided p-value of a difference whose variance is the sum of parts, each with its degrees of freedom."""
    from scipy.stats import t

    variance = sum(part for part, _ in parts)
    if not variance:
        return 1.0 if difference == 0 else 0.0
    freedom = variance**2 / (sum(part**2 / n for part, n in parts) or 1e-300)
    return float(2 * t.sf(abs(difference) / math.sqrt(variance), freedom))


def _changes(store: Store, first: Row, second: Row, task: str | None) -> list[Part] | None:
    """What every question adds to the difference of two rows; None if their answers are not all stored."""
    if task is None and not all(map(_average_is_known, (*first.runs, *second.runs))):
        return None
    tasks = first.first.tasks if task is None else [task]
    found: list[Part] = []
    for name in tasks:
        entries = [[stored_scores(store, run).get(name) for run in row.runs] for row in (first, second)]
        ours, theirs = ([entry for entry in side if entry] for side in entries)
        if len(ours) < len(first.runs) or len(theirs) < len(second.runs):
            return None
        changes = paired_changes(ours, theirs)
        if changes is None:
            return None
        weight = 1.0 if task else 1 / (len(tasks) * first.first.scales.get(name, 1.0))
        found += _weighted(changes, weight, name)
    return found


def _weighted(changes: list[Part], weight: float, task: str) -> Iterator[Part]:
    """Parts in an average over benchmarks, whose units and strata are their own."""
    for value, unit, stratum in changes:
        yield Part(weight * value, (task, unit), (task, stratum))


def _average_is_known(run: Run) -> bool:
    """Whether the average is the mean of the main metrics over their scales, as far as a result tells these."""
    values = [run.main_metric(task).get("value") for task in run.tasks]
    known = [v / run.scales.get(task, 1.0) for v, task in zip(values, run.tasks, strict=True) if v is not None]
    average = run.main_metric(None).get("value")
    return len(known) == len(values) > 0 and math.isclose(statistics.fmean(known), average or 0.0, rel_tol=1e-6)
