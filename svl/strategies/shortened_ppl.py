"""Loss without each block (Shortened LLaMA, arXiv 2402.02834, the PPL criterion): one shot, no greedy steps.

Importance of block i is the loss of the model without it (its perplexity, in the paper, ranks alike). The paper's "+"
keeps the first four and the last two blocks.

Cost: one loss per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, check_count
from svl.strategies.shortened import Shortened


@dataclass(frozen=True)
class ShortenedPpl(Shortened):
    """Remove the blocks without which the loss is lowest.

    Attributes:
        samples: calibration samples that losses are measured on (null: all).
    """

    samples: int | None = 16
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self) -> None:
        check_count("strategy.samples", self.samples, least=1, unless="all")

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: the loss without the layer; layers that may not go count as the one missed most."""
        stats = stats.without(self.protected)
        layers = stats.candidates(n_remove)
        _, losses = stats.required_probe().with_samples(self.samples).losses((), layers)
        ceiling = max(losses.values(), default=0.0)
        return stats.plan([losses.get(i, ceiling) for i in range(stats.n_layers)], n_remove)
