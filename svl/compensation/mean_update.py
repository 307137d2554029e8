"""The mean update of a removed run as a constant ("emulated update", arXiv 2407.16286).

The mean over tokens of h_e - h_s for the run [s, e) is added to what the kept layer before it writes. Where that
layer's output projection has a bias, it goes there, exactly. Elsewhere (LLaMA and most others) it is folded into the
weight: u minimises sum over tokens of (M u - 1)^2 plus a ridge, M being what the MLP writes, and W_down gains the rank
one term mean u^T W_down; a note says how constant M u is.

Cost: one more pass over the calibration set, up to the deepest removed layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from svl.core import Hidden, Patch, Plan, SvlError, Update, one_of
from svl.regression import Regression


@dataclass(frozen=True)
class MeanUpdate:
    """One vector per removed run.

    Attributes:
        ridge: of the fit of u, relative to the mean squared norm of a coordinate of M.
        rows: selected (tokens weighted by the selector) | all.
    """

    ridge: float = 1e-2
    rows: str = "all"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        one_of("compensation.rows", self.rows, ("selected", "all"))
        if self.ridge < 0:
            raise SvlError(f"compensation.ridge is {self.ridge:g}, but must be at least 0")

    def fit(self, hidden: Hidden, plan: Plan) -> Patch:
        """The mean update of every removed run that has a kept layer before it.

        Raises:
            SvlError: if the model lacks the projection, or the selector leaves no token.
        """
        one_of("the writer that compensation needs", "mlp", tuple(hidden.writers))
        runs = [(start, stop) for start, stop in plan.runs if start > 0]
        notes = [] if len(runs) == len(plan.runs) else ["no layer before layer 0: its run is not compensated"]
        if not runs:
            return Patch(notes=tuple(notes))
        fits, means = {run: Regression() for run in runs}, {run: Regression() for run in runs}
        for sample in hidden.stream(sorted({i for run in runs for i in run}), [(s - 1, "mlp") for s, _ in runs]):
            for start, stop in runs:
                w = sample.weights if sample.weights.ndim == 1 else sample.weights[start - 1]
                w = torch.ones_like(w) if self.rows == "all" else w
                gap = sample.h(stop) - sample.h(start)
                one = torch.ones_like(gap[:, :1])
                means[start, stop].add(one, gap, w)
                fits[start, stop].add(sample.wrote(start - 1, "mlp"), one, w)
        updates = {}
        for start, stop in runs:
            mean = means[start, stop].solve(0)[0].float().cpu()
            if hidden.has_bias(start - 1, "mlp"):
                updates[start - 1, "mlp"] = Update(shift=mean)
                continue
            u = fits[start, stop].solve(self.ridge)
            updates[start - 1, "mlp"] = Update(left=mean[:, None], right=u.mT.float().cpu().contiguous())
            off = fits[start, stop].left_over(u)
            notes.append(
                f"layer {start - 1} has no bias: the constant is folded into its weight, {off:.0%} of it missed"
            )
        return Patch(updates, notes=tuple(notes))
