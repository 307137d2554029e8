"""Greedy removal by loss (SLEB, arXiv 2402.09025): switch every block off in turn, drop the one that is missed least.

Repeated n times on top of what is removed already. The loss is that of the calibration set's answer tokens, of plain
text every next token. The first and the last block still there are never tried.

Cost for n of L layers, all removable: sum over steps k < n of (L - 2 - k) losses, e.g. 189 for 7 of 32. They take about
half of as many forward passes or less (see `svl.calibration.removal_probe`), and each is kept in the store, so that a
longer search continues a shorter one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, SvlError, check_count


@dataclass(frozen=True)
class Sleb(Strategy):
    """Greedy search.

    Attributes:
        samples: calibration samples that losses are measured on (null: all).
    """

    samples: int | None = 16
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    stepwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("strategy.samples", self.samples, least=1, unless="all")

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if as many layers, without the first and the last one, may not go."""
        stats.without((0, -1)).candidates(n_remove)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: the loss added by the layer's own removal, at its step or, of kept ones, when last tried.

        Layers that were never tried count as the most important one that was.
        """
        allowed, probe = stats.candidates(n_remove), stats.required_probe().with_samples(self.samples)
        importance: dict[int, float] = {}
        removed: list[int] = []
        for _ in range(n_remove):
            alive = [i for i in range(stats.n_layers) if i not in removed]
            base, losses = probe.losses(removed, [i for i in alive[1:-1] if i in allowed])
            if not losses:
                raise SvlError(f"all but the first and the last layer are gone after {len(removed)} of {n_remove}")
            importance |= {i: loss - base for i, loss in losses.items()}
            removed.append(min(losses, key=lambda i: (losses[i], -i)))
        ceiling = max(importance.values(), default=0.0)
        return Plan(stats.n_layers, tuple(removed), tuple(importance.get(i, ceiling) for i in range(stats.n_layers)))
