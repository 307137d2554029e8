"""Size of a block's weights (Shortened LLaMA, arXiv 2402.02834, the magnitude criterion). Needs no data.

Importance of block i is the sum over its weights of |W|^power. The paper's "+" keeps the first four and the last two.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, check_count
from svl.strategies.shortened import Shortened


@dataclass(frozen=True)
class ShortenedMagnitude(Shortened):
    """Remove the blocks of smallest weights.

    Attributes:
        power: 1 (as in the paper) or 2.
    """

    power: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __post_init__(self) -> None:
        check_count("strategy.power", self.power, least=1)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: the size."""
        stats = stats.without(self.protected)
        stats.candidates(n_remove)
        return stats.plan(stats.required_probe().magnitude(self.power), n_remove)
