"""One layer after another, each chosen on what the earlier ones left (the loop of Prune&Comp, arXiv 2507.18212).

The strategy `of` is asked for one layer. That layer goes, the run's compensation makes up for all that are gone, and
what `of` needs is measured again on this model, token weights included, before it is asked for the next one. In the
paper, `of` is ShortGPT's, and the compensation `magnitude` (`strategy=prune_and_comp`).

Compensations are fitted to the dense model for all removed layers together; `magnitude` follows the order, as the paper
does (see there).

`of` is one that judges every layer by itself (`Strategy.stepwise`). Layers that settings name (`protected`,
`selector.layers`) are the dense model's.

Cost, for n layers: what `of` costs, and n - 1 times that again (one pass over the calibration set for its statistics,
or what its trials take) with the passes of the compensation: of ShortGPT and `magnitude`, at most 2 (n - 1) passes. The
plan says how many there were, all in all: samples that went through a layer, divided by the samples and layers of one
pass of the dense model. Each step is kept in the store, so that a higher ratio continues a lower one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, check_stepwise
from svl.strategies.cosine import Cosine


@dataclass(frozen=True)
class Iterative(Strategy):
    """The loop around a strategy.

    Attributes:
        of: which layer goes next; one that chooses several layers together cannot be asked so.
    """

    of: Strategy = field(default_factory=Cosine)
    needs: ClassVar[frozenset[str]] = frozenset({"rescoring"})

    def __post_init__(self) -> None:
        check_stepwise("strategy.of", self.of)
        object.__setattr__(self, "needs", self.of.needs | {"rescoring"})

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError as the strategy within does: it will be asked for as many layers, if one by one."""
        stats.candidates(n_remove)
        self.of.check(stats, n_remove)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: that of a removed layer at its step, of a kept one at the last step."""
        stats.candidates(n_remove)
        rescoring, passes = stats.required_rescoring(), 0.0
        order: list[int] = []
        importance: dict[int, float] = {}
        for _ in range(n_remove):
            layer, found, took = rescoring.next_removal(self.of, order)
            order.append(layer)
            importance |= found
            passes += took
        values = tuple(importance[i] for i in range(stats.n_layers)) if len(importance) == stats.n_layers else ()
        return Plan(stats.n_layers, tuple(order), values, provenance={"passes": round(passes, 1)}, order=tuple(order))
