"""What the criteria of Shortened LLaMA (arXiv 2402.02834) share: "+" keeps the first four and last two blocks."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from svl.core import Stats, Strategy


@dataclass(frozen=True)
class Shortened(Strategy, ABC):
    """One criterion, without protected layers.

    Attributes:
        protected: layers never removed; negative numbers count from the end, -1 being the last ("+").
    """

    protected: tuple[int, ...] = (0, 1, 2, 3, -2, -1)
    stepwise: ClassVar[bool] = True

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if layers that do not exist are protected, or too few are left."""
        stats.without(self.protected).candidates(n_remove)
