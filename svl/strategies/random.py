"""Random layers: the floor that every method must beat. Report several seeds.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from svl.core import Plan, Stats, Strategy, check_count


@dataclass(frozen=True)
class Random(Strategy):
    """Remove layers in a random order fixed by `seed` (nested over ratios: more removal adds layers)."""

    stepwise: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        check_count("strategy.seed", self.seed)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance is a random permutation of 0..L-1; of layers that are left, their places in the dense model's."""
        order = torch.randperm(stats.dense_layers, generator=torch.Generator().manual_seed(self.seed))
        return stats.plan(order[list(stats.numbers)].double(), n_remove)
