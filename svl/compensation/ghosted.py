"""The least-squares map at the cut (Ghosted Layers, arXiv 2605.15491).

In place of a removed run [s, e), every token's residual stream h becomes h (I + M), where M minimises

    sum over tokens of |h_e - h_s - h_s M|^2 + ridge |M|^2,

h_s and h_e being states of the dense model. No change of weights beside the cut can do better on such states with a
map of h_s alone, so it is the yardstick for compensations that fold; `linear` and its relatives read what an MLP writes
instead. The paper has a ridge of 1e-6, not relative to anything, which interpolates where there are fewer tokens than
channels; here, it is the one, of `ridges`, that does best on every `fold`-th sample after a fit on the others, and the
final fit is on all of them.

The paper has one map for a contiguous block; of scattered layers, it has one for each layer removed, multiplied where
they are neighbours. That is `scope` layer; here, a run has one map by default.

It works in memory only. Cost: one more pass over the calibration set, up to the end of the deepest run, and d^3 per map
and ridge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from svl.compensation.regression import HeldOutRegression, check_ridges
from svl.compensation.run_rows import check_rows
from svl.core import Compensation, HiddenStates, Patch, Plan, one_of


@dataclass(frozen=True)
class Ghosted(Compensation):
    """One d x d map per removed run.

    Attributes:
        ridges: candidates, relative to the mean squared norm of a coordinate of h_s; one alone is taken as it is.
            Infinity: no change.
        fold: which share of the samples chooses the ridge: one in so many.
        scope: run (one fit from the run's beginning to its end) | layer (one per layer, multiplied).
        rows: all (the paper's) | selected (tokens weighted by the selector).
    """

    ridges: tuple[float, ...] = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
    fold: int = 5
    scope: str = "run"
    rows: str = "all"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    foldable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of("compensation.scope", self.scope, ("run", "layer"))
        check_rows(self.rows)
        check_ridges(self.ridges, self.fold)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """I + M of every removed run; notes name the ridges and the share of the gap that is left.

        Raises:
            SvlError: if the selector leaves no token, or hidden states are not finite.
        """
        steps = plan.runs if self.scope == "run" else tuple((i, i + 1) for i in plan.removed)
        if not steps:
            return Patch()
        fits = {step: HeldOutRegression(self.ridges, self.fold) for step in steps}
        for sample in hidden.stream(sorted({i for step in steps for i in step}), plan=plan.with_layers(())):
            for (start, stop), regression in fits.items():
                before, weights = sample.h(start), sample.weights[start]
                if self.rows == "all":
                    weights = torch.ones_like(weights)
                regression.add_sample(before, sample.h(stop) - before, weights, sample.generated)
        solved = {step: regression.solve() for step, regression in fits.items()}
        maps = {}
        for start, stop in plan.runs:
            any_map = solved[steps[0]][0]
            total = torch.eye(len(any_map), dtype=any_map.dtype).to(any_map.device)
            for first, last in steps:
                if start <= first and last <= stop:
                    total = total + total @ solved[first, last][0]
            maps[start] = total.mT.float().cpu().contiguous()
        notes = [f"layers {start}..{stop - 1}: {note}" for (start, stop), (_, note) in solved.items()]
        return Patch(maps=maps, notes=tuple(notes))
