"""Subspace-Compensated Pruning (SCP): strengthen a kept layer's output in the directions that a removed run wrote.

Short-LVLM (arXiv 2507.23362), stage (b). With X^l = h_{l+1} the output of layer l, a removed layer l_p and a kept
layer l_r, the rows of H = X^{l_p} - X^{l_r} are feature gaps of tokens; V_k holds H's first k right singular vectors,
and the kept layer's output projection becomes W <- (I + gain V_k V_k^T) W (gain 1 in the paper). No parameters are
added. Only H^T H is accumulated (fp64, d x d), whose leading eigenvectors are V_k.

Cost: one more pass over the calibration set, up to the deepest layer involved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from svl.core import Hidden, Patch, Plan, SvlError, Update, one_of


@dataclass(frozen=True)
class Subspace:
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
    """

    rank: int = 4
    gain: float = 1.0
    rows: str = "selected"
    targets: tuple[str, ...] = ("mlp",)
    anchor: str = "before"
    scope: str = "run"
    centered: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        one_of("compensation.rows", self.rows, ("selected", "all", "means"))
        one_of("compensation.anchor", self.anchor, ("before", "after"))
        one_of("compensation.scope", self.scope, ("run", "layer"))
        for target in self.targets:
            one_of("compensation.targets", target, ("mlp", "attn"))
        if self.rank < 0:
            raise SvlError(f"compensation.rank is {self.rank}, but must be at least 0")

    def fit(self, hidden: Hidden, plan: Plan) -> Patch:
        """V_k of every removed run as low-rank updates of its anchor.

        Raises:
            SvlError: if the model lacks a target projection, or `rank` exceeds its width.
        """
        for target in self.targets:
            one_of("compensation.targets for this model", target, tuple(hidden.writers))
        pairs, notes = {}, []  # anchor layer -> [(point of X^{l_p}, point of X^{l_r})]
        for start, stop in plan.runs:
            anchor = start - 1 if self.anchor == "before" else stop
            if not 0 <= anchor < plan.n_layers:
                notes.append(f"layers {start}..{stop - 1} have no kept layer {self.anchor} them: not compensated")
                continue
            farthest = stop - 1 if self.anchor == "before" else start
            removed = [farthest] if self.scope == "run" else range(start, stop)
            pairs[anchor] = [(p + 1, anchor + 1) for p in removed]
        if self.rank == 0 or not pairs:
            return Patch(notes=tuple(notes))

        points = sorted({i for rows in pairs.values() for pair in rows for i in pair})
        gram: dict[int, Any] = dict.fromkeys(pairs, 0.0)
        total: dict[int, Any] = dict.fromkeys(pairs, 0.0)
        count: dict[int, Any] = dict.fromkeys(pairs, 0.0)
        for sample in hidden.stream(points):
            for anchor, rows in pairs.items():
                w = sample.weights if sample.weights.ndim == 1 else sample.weights[anchor]
                w = (torch.ones_like(w) if self.rows == "all" else w).double()[:, None]
                for p, r in rows:
                    gap = (sample.h(p) - sample.h(r)).double()
                    if self.rows == "means":
                        if w.sum() == 0:
                            continue
                        gap = (w * gap).sum(0, keepdim=True) / w.sum()
                        weighted, n = gap, torch.ones(())
                    else:
                        weighted, n = w * gap, w.sum()
                    gram[anchor] = gram[anchor] + gap.mT @ weighted
                    total[anchor] = total[anchor] + weighted.sum(0)
                    count[anchor] = count[anchor] + n
        updates: dict[tuple[int, str], Update] = {}
        spectra = {}
        for anchor, matrix in gram.items():
            if count[anchor] == 0:
                raise SvlError("the selector leaves no token for compensation; choose another selector or rows=all")
            if self.rank > len(matrix):
                raise SvlError(f"compensation.rank is {self.rank}, but the model is only {len(matrix)} wide")
            if not bool(matrix.isfinite().all()):
                raise SvlError("hidden states are not finite, so they span nothing; choose another model.dtype")
            noise = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.trace()
            if self.centered:
                matrix = matrix - torch.outer(total[anchor], total[anchor]) / count[anchor]
            values, vectors = torch.linalg.eigh(matrix)
            k = min(self.rank, int((values > noise).sum()))  # beyond the rank of H, vectors are arbitrary
            if k < self.rank:
                notes.append(f"the gap beside layer {anchor} spans only {k} of the {self.rank} directions asked for")
            spectra[anchor] = tuple(values.clamp(min=0).sqrt().flip(0).tolist())
            v = vectors.flip(1)[:, :k].float().cpu()
            update = Update(left=self.gain * v, right=v.mT.contiguous())
            updates |= {(anchor, target): update for target in self.targets}
        return Patch(updates, notes=tuple(notes), spectra=spectra)
