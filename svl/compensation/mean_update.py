"""The mean update of a removed run as a constant ("emulated update", arXiv 2407.16286).

The mean over tokens of h_e - h_s for the run [s, e) is added to what the kept layer before it writes. Where that
layer's output projection has a bias, it goes there, exactly. Elsewhere (LLaMA and most others) it is folded into the
weight: u minimises sum over tokens of (M u - 1)^2 plus a ridge, M being what the MLP writes, and W_down gains the rank
one term mean u^T W_down; a note says how constant M u is.

Cost: one more pass over the calibration set, up to the deepest removed layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from svl.compensation.regression import Regression
from svl.compensation.run_rows import anchor_of, check_rows, notes_on_runs, stream_run_rows
from svl.core import Compensation, HiddenStates, Patch, Plan, Update, check_number


@dataclass(frozen=True)
class MeanUpdate(Compensation):
    """One vector per removed run.

    Attributes:
        ridge: of the fit of u, relative to the mean squared norm of a coordinate of M.
        rows: selected (tokens weighted by the selector) | all.
    """

    ridge: float = 1e-2
    rows: str = "all"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        check_rows(self.rows)
        check_number("compensation.ridge", self.ridge, least=0)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """The mean update of every removed run that has a kept layer before it.

        Raises:
            SvlError: if the model lacks the projection, or the selector leaves no token.
        """
        runs, notes = plan.runs_with_layer_before, [*notes_on_runs(plan)]
        if not runs:
            return Patch(notes=tuple(notes))
        fits, means = {run: Regression() for run in runs}, {run: Regression() for run in runs}
        for run, rows in stream_run_rows(hidden, plan, self.rows):
            one = torch.ones_like(rows.before[:, :1])
            means[run].add(one, rows.after - rows.before, rows.weights)
            fits[run].add(rows.written, one, rows.weights)
        updates = {}
        for run in runs:
            layer, role = anchor_of(plan, run)
            mean = means[run].solve(0)[0].float().cpu()
            if hidden.has_bias(layer, role):
                factor = cast("float", hidden.stream_factor(layer, role))  # `written` would have told of none
                updates[layer, role] = Update(shift=mean / factor)
                continue
            u = fits[run].solve(self.ridge)
            updates[layer, role] = Update(left=mean[:, None], right=u.mT.float().cpu().contiguous())
            missed = fits[run].left_over(u)
            notes.append(
                f"layer {layer} has no bias: the constant is folded into its weight, {missed:.0%} of it missed"
            )
        return Patch(updates, notes=tuple(notes))
