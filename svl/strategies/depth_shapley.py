"""Leave-one-out effect of every block ("A deeper look at depth pruning", arXiv 2407.16286).

Importance of block i is what its removal alone does: to the loss, or to the logits (their mean L2 distance). The paper
calls it the Shapley value of the block, estimated from the one coalition of all others.

Cost: one loss (or one set of logits) per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, check_count, one_of


@dataclass(frozen=True)
class DepthShapley(Strategy):
    """Remove the blocks of least effect.

    Attributes:
        effect: on the "loss" or the "logits".
        samples: calibration samples that effects are measured on (null: all).
    """

    effect: str = "loss"
    samples: int | None = 16
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    stepwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("strategy.effect", self.effect, ("loss", "logits"))
        check_count("strategy.samples", self.samples, least=1, unless="all")

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: the effect; layers that may not go count as the one of largest effect."""
        layers, probe = stats.candidates(n_remove), stats.required_probe().with_samples(self.samples)
        if self.effect == "loss":
            base, losses = probe.losses((), layers)
            effect = {i: loss - base for i, loss in losses.items()}
        else:
            effect = probe.changes((), layers)
        ceiling = max(effect.values(), default=0.0)
        return stats.plan([effect.get(i, ceiling) for i in range(stats.n_layers)], n_remove)
