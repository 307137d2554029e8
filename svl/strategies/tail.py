"""Deepest layers, keeping the last: the "simple" rule of arXiv 2403.17887 and a sanity baseline.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from svl.core import Plan, Stats, Strategy


@dataclass(frozen=True)
class Tail(Strategy):
    """Remove the deepest layers except the very last."""

    stepwise: ClassVar[bool] = True

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance falls with depth; the last layer has the highest."""
        importance = torch.arange(stats.n_layers, 0, -1, dtype=torch.float64)
        importance[-1] = stats.n_layers + 1
        return stats.plan(importance, n_remove)
