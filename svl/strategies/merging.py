"""What strategies that merge layers share: plans made of merges, their similarity, and the search for a threshold."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from svl.compensation.merge import merge_coefficients
from svl.core import Patch, Plan, RemovalProbe, Stats, SvlError, check_number

log = logging.getLogger(__name__)

Merges = tuple[tuple[int, tuple[int, ...]], ...]  # as in Plan
Walk = Callable[[float, int], Merges]  # threshold, number of layers after which it ends -> merges
Similarity = Callable[[Merges], float]

STEPS = 10  # of bisection: thresholds to 0.002


def check_threshold(threshold: float | None) -> None:
    """Raise SvlError unless `threshold` may be a similarity to stay above; None: it is searched for."""
    check_number("strategy.threshold", threshold, least=-1, most=1, unless="a search")


def check_reach(n_layers: int, walk: Walk, n_remove: int) -> None:
    """Raise SvlError if a walk that takes every merge does not remove `n_remove` layers."""
    if (reached := len(merge_plan(n_layers, walk(-1.0, n_remove)).removed)) < n_remove:
        raise SvlError(
            f"merging reaches {reached} removed layers only, not {n_remove}: choose a lower ratio, or other settings "
            "of the walk"
        )


def like_all(merges: Merges) -> float:
    """The similarity of a walk that takes every merge."""
    return 1.0


def tell_kinds(stats: Stats) -> None:
    """Log which layers are not merged, if any."""
    if apart := [i for i, kind in enumerate(stats.kinds) if kind is None]:
        log.info("  nothing is merged into layers %s, as visual features enter behind them (DeepStack)", apart)
    if len(set(stats.kinds) - {None}) > 1:
        log.info("  layers whose projections differ in names or shapes are not merged into one another")


def plan_by_threshold(n_layers: int, walk: Walk, threshold: float) -> Plan:
    """The plan of what a threshold lets pass; where that is nothing, the log says so."""
    merges = walk(threshold, n_layers - 1)
    if not merges:
        log.warning("  no merge stays above a similarity of %g, so nothing is removed; lower it", threshold)
    return merge_plan(n_layers, merges, threshold)


def merge_plan(n_layers: int, merges: Merges, threshold: float | None = None) -> Plan:
    """The plan of a sequence of merges; `threshold` is told to the reader only."""
    removed = tuple(i for _, gone in merges for i in gone)
    made = {} if threshold is None else {"threshold": threshold}
    return Plan(n_layers, removed, merges=merges, provenance=made)


def merge_similarity(probe: RemovalProbe, n_layers: int, formula: str) -> Similarity:
    """`probe.similarity` of the model after some merges; what was measured is remembered.

    `formula`: of merging, paper | released.
    """

    @cache
    def similarity(merges: Merges) -> float:
        return probe.similarity(merge_plan(n_layers, merges), Patch(blends=merge_coefficients(merges, formula)))

    return similarity


def search_threshold(walk: Walk, n_layers: int, n_remove: int) -> Plan:
    """The plan of the highest threshold, found by bisection, whose walk removes `n_remove` layers, as some does."""
    low, high, best = -1.0, 1.0, walk(-1.0, n_remove)
    for _ in range(STEPS):
        middle = (low + high) / 2
        merges = walk(middle, n_remove)
        if len(merge_plan(n_layers, merges).removed) == n_remove:
            low, best = middle, merges
        else:
            high = middle
    return merge_plan(n_layers, best, low)
