"""Subspace-Compensated Pruning (SCP): strengthen a kept layer's output in the directions that a removed run wrote.

Short-LVLM (arXiv 2507.23362), stage (b). With X^l = h_{l+1} the output of layer l, a removed layer l_p and a kept
layer l_r, the rows of H = X^{l_p} - X^{l_r} are feature gaps of tokens; V_k holds H's first k right singular vectors,
and the kept layer's output projection becomes W <- (I + gain V_k V_k^T) W (gain 1 in the paper). No parameters are
added. Only H^T H is accumulated (fp64, d x d), whose leading eigenvectors are V_k.

The guard is ours, and off in the paper. B being the rows that the projection writes, to all tokens, with a norm above
`guard` times the median, and q the leading right singular vector of B, V_k then holds the leading eigenvectors of
(I - q q^T) H^T H (I - q q^T). Where no row is that large, it is the paper's formula.

Cost: one more pass over the calibration set, up to the deepest layer involved; where the guard acts, two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.compensation.gap_subspace import (
    Points,
    check_guard,
    find_massive_writes,
    leading_directions,
    measure_gaps,
)
from svl.compensation.run_rows import targets_left
from svl.core import Compensation, HiddenStates, Patch, Plan, Update, check_count, check_number, check_targets, one_of


@dataclass(frozen=True)
class Subspace(Compensation):
    """SCP. The figure of the paper leaves anchor, rows, targets, scope, centring and rank open.

    Attributes:
        rank: k, number of directions; 0 changes nothing.
        gain: factor of V V^T; -1 removes the directions instead (Nullu's sign).
        rows: selected (one row per token, weighted by the selector) | all (every token) | means (one mean vector of the
            selected tokens per sample, as in Nullu).
        targets: projections of the anchor that are changed: "mlp" (down_proj), "attn" (o_proj) or both.
        anchor: before (the kept layer in front of the removed run, as drawn in the paper) | after.
        scope: run (one H per removed run: its gap as a whole) | layer (the rows of every removed layer).
        centered: subtract the mean row.
        guard: how many times its median norm a projection must write to a token for that direction to be left out of
            V_k; None: never.
    """

    rank: int = 4
    gain: float = 1.0
    rows: str = "selected"
    targets: tuple[str, ...] = ("mlp",)
    anchor: str = "before"
    scope: str = "run"
    centered: bool = False
    guard: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        one_of("compensation.rows", self.rows, ("selected", "all", "means"))
        one_of("compensation.anchor", self.anchor, ("before", "after"))
        one_of("compensation.scope", self.scope, ("run", "layer"))
        check_targets("compensation.targets", self.targets)
        check_count("compensation.rank", self.rank)
        check_number("compensation.gain", self.gain)
        check_guard(self.guard)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """V_k of every removed run as low-rank updates of its anchor; notes name where the guard acted.

        Raises:
            SvlError: if the model lacks a target projection, or `rank` exceeds its width.
        """
        points, notes = self.gap_points(plan)
        targets = {anchor: targets_left(plan, anchor, self.targets) for anchor in points}
        for target in (*self.targets, *(role for roles in targets.values() for role in roles)):
            one_of("compensation.targets for this model", target, tuple(hidden.writers))
        if self.rank == 0 or not points:
            return Patch(notes=tuple(notes))
        lost = [(i, role) for i in points for role in self.targets if role not in targets[i]]
        notes += [f"layer {i} has no {role} any more: its {targets[i][0]} is changed alone" for i, role in lost]
        writers = [] if self.guard is None else [(i, role) for i, roles in targets.items() for role in roles]
        base = plan.with_layers(())
        grams, norms = measure_gaps(hidden, points, self.rows, writers, base)
        massive = {} if self.guard is None else find_massive_writes(hidden, norms, self.guard, base)

        updates: dict[tuple[int, str], Update] = {}
        spectra: dict[int, tuple[float, ...]] = {}
        for anchor, gaps in grams.items():
            matrix = gaps.centered_matrix() if self.centered else gaps.matrix()
            usual, values = leading_directions(matrix, self.rank)
            spectra[anchor] = tuple(values.clamp(min=0).sqrt().tolist())
            for target in targets[anchor]:
                directions = usual
                if write := massive.get((anchor, target)):
                    directions, _ = leading_directions(matrix, self.rank, write.direction)
                    notes.append(write.note(anchor, target))
                if (k := directions.shape[1]) < self.rank:
                    spanned = f"spans only {k} of the {self.rank} directions asked for"
                    notes.append(f"the gap beside layer {anchor} {spanned}")
                v = directions.float().cpu()
                updates[anchor, target] = Update(left=self.gain * v, right=v.mT.contiguous())
        return Patch(updates, notes=tuple(dict.fromkeys(notes)), spectra=spectra)

    def gap_points(self, plan: Plan) -> tuple[dict[int, list[Points]], list[str]]:
        """Anchor layer -> the points (X^{l_p}, X^{l_r}) of its gaps; and notes on runs that have no anchor."""
        points: dict[int, list[Points]] = {}
        notes = []
        for start, stop in plan.runs:
            anchor = start - 1 if self.anchor == "before" else stop
            if not 0 <= anchor < plan.n_layers:
                notes.append(f"layers {start}..{stop - 1} have no kept layer {self.anchor} them: not compensated")
                continue
            farthest = stop - 1 if self.anchor == "before" else start
            removed = [farthest] if self.scope == "run" else range(start, stop)
            points[anchor] = [(p + 1, anchor + 1) for p in removed]
        return points, notes
