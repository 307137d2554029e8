"""Layers named by hand: for single-layer probes, published layer sets and plans of other tools.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from svl.core import Plan, Stats, Strategy


@dataclass(frozen=True)
class Manual(Strategy):
    """Remove exactly what is named (0-based), whatever the ratio.

    Attributes:
        layers: whole layers.
        attn: layers that lose their attention only.
        mlp: layers that lose their MLP only.
    """

    layers: tuple[int, ...] = ()
    attn: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """The plan that was asked for."""
        return Plan(stats.n_layers, self.layers, removed_attn=self.attn, removed_mlp=self.mlp)
