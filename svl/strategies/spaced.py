"""Low-influence layers that keep their distance (the spacing-aware baseline of arXiv 2603.20275).

Of all sets of n layers with at least `gap` kept layers between any two, the one of least summed importance
(1 - mean cosine, as `shortgpt`) goes, found exactly by dynamic programming. Where so many layers do not fit, the gap
shrinks, and the plan and the log say to what. The paper finds that at high ratios spacing matters more than ranking;
its exact rule is not published.

Cost: one calibration pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, check_count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spaced(Strategy):
    """Least total cosine importance under a minimal distance.

    Attributes:
        gap: kept layers between two removed ones, at least.
    """

    gap: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"cosine"})

    def __post_init__(self) -> None:
        check_count("strategy.gap", self.gap)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: 1 - mean cosine. Its provenance names the `gap` that was kept; the log says if it shrank."""
        allowed = stats.candidates(n_remove)
        importance = (1 - stats.cosine()).tolist()
        gap = self.gap
        while len(as_many_apart(allowed, gap)) < n_remove:  # with a gap of 0, all of them may go
            gap -= 1
        if gap < self.gap:
            log.warning(
                "  strategy.gap is %d, but %d layers do not fit that far apart: it is %d", self.gap, n_remove, gap
            )
        removed = cheapest_apart(importance, allowed, n_remove, gap)
        return Plan(stats.n_layers, removed, tuple(importance), provenance={"gap": gap})


def as_many_apart(layers: Sequence[int], gap: int) -> list[int]:
    """As many of these layers, ascending, as there can be with at least `gap` others between any two."""
    found: list[int] = []
    for i in layers:
        if not found or i - found[-1] > gap:
            found.append(i)
    return found


def cheapest_apart(importance: Sequence[float], allowed: Collection[int], n: int, gap: int) -> tuple[int, ...]:
    """The n of the `allowed` layers of least summed importance with at least `gap` others between any two."""
    none: tuple[float, tuple[int, ...]] = (math.inf, ())
    best = [[(0.0, none[1])] * (len(importance) + 1)]  # best[k][i]: sum and layers of the cheapest k below layer i
    for _ in range(n):
        row = [none]
        for i, cost in enumerate(importance):
            before, layers = best[-1][max(i - gap, 0)]
            row.append(min(row[-1], (before + cost, (*layers, i)) if i in allowed else none))
        best.append(row)
    return best[-1][-1][1]
