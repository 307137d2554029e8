"""What strategies that merge layers share: plans made of merges, their similarity, and the search for a threshold."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from svl.core import Patch, Plan, RemovalProbe, Stats, SvlError, check_number
from svl.core.merging import merge_coefficients

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


def plan_merges(
    stats: Stats,
    n_remove: int,
    walk_by: Callable[[Similarity], Walk],
    *,
    formula: str,
    threshold: float | None,
    samples: int | None,
) -> Plan:
    """The merges of a walk; its provenance names the threshold, and the formula of merging that they were chosen with.

    Args:
        stats: with a probe.
        n_remove: how many layers go, if there is no threshold.
        walk_by: the walk by a similarity.
        formula: of merging, paper | released.
        threshold: of similarity; None: the highest that removes `n_remove` layers, as some does.
        samples: how many similarity is measured on; None: all.
    """
    tell_kinds(stats)
    probe, n_layers = stats.required_probe().with_samples(samples), stats.n_layers
    walk = walk_by(merge_similarity(probe, n_layers, formula))
    if threshold is None:
        threshold, merges = search_threshold(walk, n_layers, n_remove)
    else:
        merges = walk(threshold, n_layers - 1)
        if not merges:
            log.warning("  no merge stays above a similarity of %g, so nothing is removed; lower it", threshold)
    return replace(merge_plan(n_layers, merges), provenance={"threshold": threshold, "formula": formula})


def merge_plan(n_layers: int, merges: Merges) -> Plan:
    """The plan of a sequence of merges."""
    return Plan(n_layers, tuple(i for _, gone in merges for i in gone), merges=merges)


def merge_similarity(probe: RemovalProbe, n_layers: int, formula: str) -> Similarity:
    """`probe.similarity` of the model after some merges; what was measured is remembered.

    `formula`: of merging, paper | released.
    """

    @cache
    def similarity(merges: Merges) -> float:
        return probe.similarity(merge_plan(n_layers, merges), Patch(blends=merge_coefficients(merges, formula)))

    return similarity


def search_threshold(walk: Walk, n_layers: int, n_remove: int) -> tuple[float, Merges]:
    """The highest threshold, found by bisection, whose walk removes `n_remove` layers, as some does; and its merges."""
    low, high, best = -1.0, 1.0, walk(-1.0, n_remove)
    for _ in range(STEPS):
        middle = (low + high) / 2
        merges = walk(middle, n_remove)
        if len(merge_plan(n_layers, merges).removed) == n_remove:
            low, best = middle, merges
        else:
            high = middle
    return low, best
