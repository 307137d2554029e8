"""Removed layers merged into the kept layer before them (LaCo, arXiv 2402.11187).

Follows the merges that the strategy decided on (`laco`), or else merges every removed run into the layer before it.
Linear projections and their biases are merged, norms are not; see `core.blends` for the two formulas.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Hidden, Patch, Plan, blends, one_of


@dataclass(frozen=True)
class Merge:
    """LaCo's weights.

    Attributes:
        formula: paper | released.
    """

    formula: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        one_of("compensation.formula", self.formula, ("paper", "released"))

    def fit(self, hidden: Hidden, plan: Plan) -> Patch:
        """Kept layers as sums over layers of the dense model."""
        runs = [(start, tuple(range(start, stop))) for start, stop in plan.runs]
        merges = plan.merges or [(start - 1, gone) for start, gone in runs if start > 0]
        notes = () if plan.merges or all(start > 0 for start, _ in runs) else ("no layer before layer 0 to merge into",)
        return Patch(blends=blends(merges, self.formula), notes=notes)
