"""The contiguous block whose input and output are most similar (LLM-Streamline, arXiv 2403.19135, without its network).

s(l, n) = mean over the selected tokens (the paper's: all) of cos(h_l, h_{l+n}); the block [l, l + n) of largest s goes.
With its trained replacement the paper removes n + 1 layers and puts one back; nothing is trained or put back here.

Cost: one calibration pass, whatever n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, one_of


@dataclass(frozen=True)
class Streamline(Strategy):
    """Block of largest cosine between its input and its output.

    Attributes:
        mean: tokens (of all samples, pooled) | samples (mean of the samples' means, as released).
    """

    mean: str = "tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"windows"})

    def __post_init__(self) -> None:
        one_of("strategy.mean", self.mean, ("tokens", "samples"))

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if no block of so many layers may go."""
        if n_remove:
            stats.starts(n_remove)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Remove one block of `n_remove` layers; importance is 1 - cosine across each single layer."""
        return stats.window(1 - stats.windows(over=self.mean), n_remove)
