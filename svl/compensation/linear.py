"""Least squares in place of a removed run (ReplaceMe, arXiv 2505.02819, the LS variant).

With M what the MLP of the kept layer before the run [s, e) writes, and h_s, h_e the states before and after the run,
T minimises sum over tokens of |M T - (h_e - h_s + M)|^2 plus a ridge, and W_down <- T^T W_down. No parameters are
added. The ridge pulls T towards zero (the paper's alpha, 0 by default there) or towards the identity, that is, towards
changing nothing.

Cost: one more pass over the calibration set, up to the deepest removed layer, and d^3 per run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from svl.compensation.regression import Halves
from svl.compensation.run_rows import anchor_of, check_rows, notes_on_runs, stream_run_rows
from svl.core import Compensation, HiddenStates, Patch, Plan, Update, check_number, one_of


@dataclass(frozen=True)
class Linear(Compensation):
    """One d x d map per removed run, folded into the down_proj before it.

    Attributes:
        ridge: relative to the mean squared norm of a coordinate of M.
        shrink: where the ridge pulls T: identity | zero.
        rows: selected (tokens weighted by the selector) | all.
        scaled: divide every token's error by the norm of its h_e, so that massive activations do not rule the fit.
    """

    ridge: float = 1e-2
    shrink: str = "identity"
    rows: str = "all"
    scaled: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        one_of("compensation.shrink", self.shrink, ("identity", "zero"))
        check_rows(self.rows)
        check_number("compensation.ridge", self.ridge, least=0)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """T - I of every removed run that has a kept layer before it.

        Raises:
            SvlError: if the model lacks the projection, or the tokens do not determine T.
        """
        runs, notes = plan.runs_with_layer_before, notes_on_runs(plan)
        if not runs:
            return Patch(notes=notes)
        fits = {run: Halves() for run in runs}
        for run, rows in stream_run_rows(hidden, plan, self.rows):
            gap, weights = rows.after - rows.before, rows.weights
            if self.scaled:
                weights = weights / rows.after.square().sum(-1)
            target = gap if self.shrink == "identity" else gap + rows.written
            fits[run].add(rows.written, target, weights, rows.generated)
        updates = {}
        for run, halves in fits.items():
            whole, (layer, role) = halves.whole(), anchor_of(plan, run)
            change = whole.solve(self.ridge)
            if whole.reads_nothing:
                notes = (*notes, f"{role} of layer {layer} writes nothing, so it fills no gap")
            if self.shrink == "zero":
                change = change - torch.eye(len(change), dtype=change.dtype, device=change.device)
            updates[layer, role] = Update(left=change.mT.float().cpu().contiguous())
        return Patch(updates, notes=notes)
