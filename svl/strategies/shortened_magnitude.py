"""Size of a block's weights (Shortened LLaMA, arXiv 2402.02834, the magnitude criterion). Needs no data.

Importance of block i is the sum over its weights of |W|^power. The paper's "+" keeps the first four and the last two.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, check_count


@dataclass(frozen=True)
class ShortenedMagnitude(Strategy):
    """Remove the blocks of smallest weights.

    Attributes:
        protected: layers never removed; negative numbers count from the end, -1 being the last ("+").
        power: 1 (as in the paper) or 2.
    """

    protected: tuple[int, ...] = (0, 1, 2, 3, -2, -1)
    power: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    stepwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("strategy.power", self.power, least=1)

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if layers that do not exist are protected, or too few are left."""
        stats.without(self.protected).candidates(n_remove)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: the size."""
        stats = stats.without(self.protected)
        stats.candidates(n_remove)
        return stats.plan(stats.required_probe().magnitude(self.power), n_remove)
