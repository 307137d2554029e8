"""Removed layers merged into the kept layer before them (LaCo, arXiv 2402.11187).

Follows the merges that the strategy decided on (`laco`), or else merges every removed run into the layer before it.
Linear projections and their biases are merged, norms are not; see `svl.core.merging` for the two formulas. Merges that
the strategy measured with one are not done by the other.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from svl.compensation.run_rows import check_whole_before_runs, notes_on_runs
from svl.core import Compensation, HiddenStates, Patch, Plan, SvlError, one_of
from svl.core.merging import FORMULAS, merge_coefficients


@dataclass(frozen=True)
class Merge(Compensation):
    """LaCo's weights.

    Attributes:
        formula: paper | released.
    """

    formula: str = "paper"

    def __post_init__(self) -> None:
        one_of("compensation.formula", self.formula, FORMULAS)

    def check_plan(self, plan: Plan) -> None:
        """Raise SvlError if a layer to merge into has lost its attention or MLP, or merges were measured otherwise."""
        check_whole_before_runs(plan, "merge")
        measured = plan.provenance.get("formula", self.formula)  # older plans do not say
        if plan.merges and measured != self.formula:
            raise SvlError(
                f"compensation.formula is {self.formula}, but the plan's merges were chosen with strategy.merge="
                f"{measured}: set both alike"
            )

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """Kept layers as sums over layers of the dense model.

        Raises:
            SvlError: as `check_plan` does.
        """
        self.check_plan(plan)
        if plan.merges:
            return Patch(blends=merge_coefficients(plan.merges, self.formula))
        merges = [(start - 1, range(start, stop)) for start, stop in plan.runs_with_layer_before]
        return Patch(blends=merge_coefficients(merges, self.formula), notes=notes_on_runs(plan))
