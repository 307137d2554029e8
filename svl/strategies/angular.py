"""The contiguous block whose input and output differ least in angle (arXiv 2403.17887; PruneMe).

d(l, n) = arccos(cos(h_l, h_{l+n})) / pi, averaged over the selected tokens (the paper's: the last one of each sample);
the block [l, l + n) of least d goes. The paper's other rule, "the deepest layers but the last", is `tail`.

Cost: one calibration pass, whatever n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, check_count


@dataclass(frozen=True)
class Angular(Strategy):
    """Block of least angular distance.

    Attributes:
        first: lowest layer that the block may start at; PruneMe and ReplaceMe never look at blocks from layer 0.
    """

    first: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"windows"})

    def __post_init__(self) -> None:
        check_count("strategy.first", self.first)

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if no block of so many layers may go."""
        if n_remove:
            stats.starts(n_remove, self.first)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Remove one block of `n_remove` layers; importance is the angular distance across each single layer."""
        distance = stats.windows(lambda cosine: cosine.clamp(-1, 1).arccos() / math.pi)
        return stats.window(distance, n_remove, self.first)
