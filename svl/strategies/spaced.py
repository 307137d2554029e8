"""Low-influence layers that keep their distance (the spacing-aware baseline of arXiv 2603.20275).

Of all sets of n layers with at least `gap` kept layers between any two, the one of least summed importance
(1 - mean cosine, as `shortgpt`) goes, found exactly by dynamic programming. Where so many layers do not fit, the gap
shrinks. The paper finds that at high ratios spacing matters more than ranking; its exact rule is not published.

Cost: one calibration pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, SvlError, check_count


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
        """Importance: 1 - mean cosine."""
        allowed = set(stats.candidates(n_remove))
        importance = (1 - stats.cosine()).tolist()
        for gap in range(self.gap, -1, -1):
            # best[k][i]: cheapest k layers below i, of which the next one may be layer i
            best: list[list[tuple[float, tuple[int, ...]] | None]] = [[(0.0, ())] * (stats.n_layers + gap + 1)]
            for k in range(n_remove):
                row: list[tuple[float, tuple[int, ...]] | None] = [None] * (stats.n_layers + gap + 1)
                for i in range(stats.n_layers):
                    options = [row[i + gap]] if row[i + gap] else []
                    if i in allowed and (before := best[k][i]) is not None:
                        options.append((before[0] + importance[i], (*before[1], i)))
                    row[i + gap + 1] = min(filter(None, options), default=None)
                best.append(row)
            if (found := best[n_remove][-1]) is not None:
                return Plan(stats.n_layers, found[1], tuple(importance))
        raise SvlError(f"cannot remove {n_remove} of the layers {sorted(allowed)}")
