"""No layer at all: the dense model as a strategy, so that it runs through the same stages as the others.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from svl.core import Plan, Stats, Strategy


@dataclass(frozen=True)
class Identity(Strategy):
    """Remove nothing, whatever the ratio."""

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """The empty plan."""
        return Plan(stats.n_layers, ())
