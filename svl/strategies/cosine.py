"""Lowest-influence layers: remove those whose input and output point the same way.

Cost: one calibration pass. With all tokens this is ShortGPT's Block Influence, BI_i = 1 - E cos(h_i, h_{i+1})
(arXiv 2403.03853); with TIS tokens it is the layer localisation of Short-LVLM (arXiv 2507.23362). The layers need not
be contiguous, and one ranking serves all ratios.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy


@dataclass(frozen=True)
class Cosine(Strategy):
    """Importance = 1 - mean cosine of layer input and output over the selected tokens."""

    needs: ClassVar[frozenset[str]] = frozenset({"cosine"})
    stepwise: ClassVar[bool] = True

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Remove the `n_remove` layers of least importance."""
        stats.candidates(n_remove)
        return stats.plan(1 - stats.cosine(), n_remove)
