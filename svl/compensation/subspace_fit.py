"""SCP with a least-squares core: W <- (I + V K V^T) W, where SCP has K = gain I.

V holds the k leading directions of the gaps of a removed run, as in `subspace`. With m the row that the projection of
the kept layer before the run writes, and h the gap row, K minimises over tokens

    sum w |V^T h - K V^T m|^2 + ridge |K - I|^2,

k^2 numbers that say how far what is written tells what is missing. A large ridge gives SCP. For each run, the ridge is
the one of `ridges` that does best on every `fold`-th sample after a fit on the others; the final fit is on all of them.

This is ours.

Cost: two more passes over the calibration set, up to the deepest layer involved; where the guard acts, three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svl.compensation.gap_subspace import check_guard, find_massive_writes, leading_directions, measure_gaps
from svl.compensation.regression import HeldOutRegression, check_ridges
from svl.compensation.run_rows import Run, anchor_of, check_rows, notes_on_runs, stream_run_rows
from svl.core import Compensation, HiddenStates, Patch, Plan, Update, check_count, one_of


@dataclass(frozen=True)
class SubspaceFit(Compensation):
    """SCP's directions, and a k x k map among them by least squares.

    Attributes:
        rank: k, number of directions.
        rows: selected (tokens weighted by the selector) | all; of the gaps as of the fit.
        guard: as of `subspace`; None: no guard.
        ridges: candidates, relative to the mean squared norm of a coordinate of V^T m; one alone is taken as it is.
        fold: which share of the samples chooses the ridge: one in so many.
    """

    rank: int = 16
    rows: str = "selected"
    guard: float | None = None
    ridges: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    fold: int = 5
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        check_rows(self.rows)
        check_guard(self.guard)
        check_ridges(self.ridges, self.fold)
        check_count("compensation.rank", self.rank, least=1)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """V K V^T of every removed run that has a kept layer before it; notes name the ridges and the gap in V left.

        Raises:
            SvlError: if the model lacks the projection, `rank` exceeds its width, or no token is selected.
        """
        runs, notes = plan.runs_with_layer_before, list(notes_on_runs(plan))
        if not runs:
            return Patch(notes=tuple(notes))
        for _, role in (anchor_of(plan, run) for run in runs):
            one_of("the writer that compensation needs", role, tuple(hidden.writers))
        directions = self._directions(hidden, plan, notes)
        regressions = {run: HeldOutRegression(self.ridges, self.fold) for run in runs if directions[run].any()}
        for run, rows in stream_run_rows(hidden, plan, self.rows) if regressions else ():
            if run not in regressions:
                continue
            written = rows.written.double() @ directions[run]
            gap = (rows.after - rows.before).double() @ directions[run]
            regressions[run].add_sample(written, gap - written, rows.weights, rows.generated)
        updates = {}
        for run, regression in regressions.items():
            change, note = regression.solve()  # K^T - I
            v = directions[run]
            left = (v + v @ change.mT).float().cpu()
            layer, role = anchor_of(plan, run)
            updates[layer, role] = Update(left=left, right=v.mT.float().cpu().contiguous())
            notes.append(f"layer {layer} {role}: {note} inside the subspace, of what SCP leaves")
        return Patch(updates, notes=tuple(notes))

    def _directions(self, hidden: HiddenStates, plan: Plan, notes: list[str]) -> dict[Run, Tensor]:
        """V of every run, fp64 [d, k]; what there is to say of it goes to `notes`."""
        runs, base = plan.runs_with_layer_before, plan.with_layers(())
        points = {start - 1: [(stop, start)] for start, stop in runs}
        watched = [] if self.guard is None else [anchor_of(plan, run) for run in runs]
        grams, norms = measure_gaps(hidden, points, self.rows, watched, base)
        massive = {} if self.guard is None else find_massive_writes(hidden, norms, self.guard, base)
        directions = {}
        for run in runs:
            anchor = anchor_of(plan, run)
            left_out = None
            if write := massive.get(anchor):
                left_out = write.direction
                notes.append(write.note(*anchor))
            directions[run], _ = leading_directions(grams[anchor[0]].matrix(), self.rank, left_out)
            if not directions[run].any():
                notes.append(f"layers {run[0]}..{run[1] - 1} leave no gap that layer {anchor[0]} could fill")
        return directions
