"""First-order salience of a block's weights (Shortened LLaMA, arXiv 2402.02834, the Taylor criterion).

Importance of block i is the sum over its weights of |W * dL/dW|, with the gradient summed over the calibration set
before the absolute value, as released. The paper's "+" keeps the first four and the last two blocks, since the
criterion ranks block 0, without which nothing works, among the least important.

Cost: one forward and backward pass, and memory for the gradients of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, check_count
from svl.strategies.shortened import Shortened


@dataclass(frozen=True)
class ShortenedTaylor(Shortened):
    """Remove the blocks of least salience.

    Attributes:
        samples: calibration samples for the gradient (null: all).
    """

    samples: int | None = 16
    needs: ClassVar[frozenset[str]] = frozenset({"probe", "gradients"})

    def __post_init__(self) -> None:
        check_count("strategy.samples", self.samples, least=1, unless="all")

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: the salience."""
        stats = stats.without(self.protected)
        stats.candidates(n_remove)
        return stats.plan(stats.required_probe().with_samples(self.samples).taylor(), n_remove)
