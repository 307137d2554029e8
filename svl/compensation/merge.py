"""Removed layers merged into the kept layer before them (LaCo, arXiv 2402.11187).

Follows the merges that the strategy decided on (`laco`), or else merges every removed run into the layer before it.
Linear projections and their biases are merged, norms are not; see `merge_coefficients` for the two formulas.

Cost: no forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from svl.compensation.run_rows import check_whole_before_runs, notes_on_runs
from svl.core import Compensation, HiddenStates, Patch, Plan, one_of


def merge_coefficients(merges: Iterable[tuple[int, Sequence[int]]], formula: str) -> dict[int, dict[int, float]]:
    """What layers become when others are merged into them, step by step, as sums over the dense model's layers.

    One step merges layers l_1 .. l_m into l. `formula` paper: W_l + sum_k (W_{l_k} - W_l) (LaCo, arXiv 2402.11187,
    eq. 1); released: W_{l_m}, to which the sum of its published code telescopes.
    """
    one_of("formula of merging", formula, ("paper", "released"))
    now: dict[int, dict[int, float]] = {}
    for into, gone in merges:
        terms = {into: 1.0 - len(gone), **dict.fromkeys(gone, 1.0)} if formula == "paper" else {gone[-1]: 1.0}
        total: dict[int, float] = {}
        for layer, factor in terms.items():
            for source, coefficient in now.get(layer, {layer: 1.0}).items():
                total[source] = total.get(source, 0.0) + factor * coefficient
        now = {k: v for k, v in now.items() if k not in gone} | {into: {k: c for k, c in total.items() if c != 0}}
    return now


@dataclass(frozen=True)
class Merge(Compensation):
    """LaCo's weights.

    Attributes:
        formula: paper | released.
    """

    formula: str = "paper"

    def __post_init__(self) -> None:
        one_of("compensation.formula", self.formula, ("paper", "released"))

    def check_plan(self, plan: Plan) -> None:
        """Raise SvlError if a layer that others would be merged into has lost its attention or MLP."""
        check_whole_before_runs(plan, "merge")

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
