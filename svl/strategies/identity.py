"""No layer at all: the dense model as a strategy, so that it runs through the same stages as the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats


@dataclass(frozen=True)
class Identity:
    """Remove nothing, whatever the ratio."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """The empty plan."""
        return Plan(stats.n_layers, ())
