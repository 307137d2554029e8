"""The second layer of the most similar pair (CoMe's choice, arXiv 2510.15304).

A(i) = mean over the selected tokens (the paper's: the last one of each sample) of arccos(cos(h_i, h_{i+2})) / pi. Of
the pair (i, i + 1) of least A, layer i + 1 goes, for `compensation=come` to join it with layer i. The paper does so one
pair after another, on the model as joined so far: that is `strategy=come`, `iterative` of this one.

Cost: one calibration pass, whatever n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy


@dataclass(frozen=True)
class LayerPairs(Strategy):
    """Pairs of layers of least angular distance."""

    needs: ClassVar[frozenset[str]] = frozenset({"windows"})
    stepwise: ClassVar[bool] = True

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if too few layers are behind another one."""
        stats.without((0,)).candidates(n_remove)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: A(i - 1) of layer i; the first layer, which nothing is before, always stays."""
        distance = stats.windows(lambda cosine: cosine.clamp(-1, 1).arccos() / math.pi).diagonal(2).tolist()
        return stats.without((0,)).plan([max(distance, default=0.0), *distance], n_remove)
