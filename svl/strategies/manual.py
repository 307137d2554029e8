"""Layers named by hand: for single-layer probes, published layer sets and plans of other tools. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from svl.core import Plan, Stats, Strategy


@dataclass(frozen=True)
class Manual(Strategy):
    """Remove exactly `layers` (0-based), whatever the ratio."""

    layers: tuple[int, ...] = ()

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """The plan that was asked for."""
        return Plan(stats.n_layers, self.layers)
