"""A diagonal scale in a rotated basis at the cut (LinearPatch, arXiv 2505.24680, without its distillation).

A removed run [s, e) would have changed the size of every channel of the residual stream. In the basis of an orthonormal
Hadamard matrix H, which spreads the few massive channels over all,

    d_k = mean over samples of (mean_t |(h_e H)[t, k]|) / (mean_t |(h_s H)[t, k]|),    P = H diag(d) H^T,

and every token's stream at the cut becomes P h. P is symmetric. With `rotate` off, H is the identity, as in the paper's
diagonal variant; one common factor instead of d is what `magnitude` folds into weights.

The paper removes one block; here, every run of a plan gets a map of its own, measured on the dense model. Hadamard
matrices of one order differ in how their rows are arranged, and d with them: of powers of two it is Sylvester's, as in
the released code, of other widths Paley's (see `hadamard`), where that code has tables.

P acts between layers, so it works in memory only. Cost: one more pass over the calibration set, up to the end of the
deepest run, and d^2 per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svl.compensation.hadamard import orthonormal_hadamard
from svl.compensation.run_rows import Run, check_rows
from svl.core import Compensation, HiddenStates, Patch, Plan, SvlError

NO_TOKEN = "the selector leaves no token for compensation; choose another selector, or rows=all"


@dataclass(frozen=True)
class LinearPatch(Compensation):
    """One symmetric map per removed run.

    Attributes:
        rotate: whether channels are scaled in the Hadamard basis; else as they are.
        rows: all (the paper's) | selected (tokens weighted by the selector; samples without any are left out).
    """

    rotate: bool = True
    rows: str = "all"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    foldable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """P of every removed run.

        Raises:
            SvlError: if there is no Hadamard matrix of the model's width, the selector leaves no token, or a channel
                has no positive size.
        """
        ratios: dict[Run, list[Tensor]] = {run: [] for run in plan.runs}
        basis: Tensor | None = None
        if not plan.runs:
            return Patch()
        for sample in hidden.stream(sorted({i for run in plan.runs for i in run}), plan=plan.with_layers(())):
            for start, stop in plan.runs:
                weights = sample.weights[start].double()
                if self.rows == "all":
                    weights = torch.ones_like(weights)
                before, after = (sample.h(i).double() for i in (start, stop))
                if basis is None:
                    basis = self._basis(before.shape[-1]).to(before.device)
                if float(weights.sum()) > 0:
                    size_before, size_after = (weights @ (h @ basis).abs() for h in (before, after))
                    ratios[start, stop].append(size_after / size_before)
        if basis is None:
            raise SvlError(NO_TOKEN)
        maps, notes = {}, []
        for (start, stop), parts in ratios.items():
            scale = _mean_scale(parts, start, stop)
            maps[start] = ((basis * scale) @ basis.mT).float().cpu()
            notes.append(
                f"layers {start}..{stop - 1}: channels grow by {float(scale.min()):.3f} to {float(scale.max()):.3f}"
            )
        return Patch(maps=maps, notes=tuple(notes))

    def _basis(self, width: int) -> Tensor:
        """H, fp64 [d, d]."""
        return orthonormal_hadamard(width) if self.rotate else torch.eye(width, dtype=torch.float64)


def _mean_scale(parts: list[Tensor], start: int, stop: int) -> Tensor:
    """d, [d], as the mean of its samples'."""
    if not parts:
        raise SvlError(NO_TOKEN)
    scale = torch.stack(parts).mean(0)
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise SvlError(
            f"across layers {start}..{stop - 1}, a channel grows by a factor that is no positive number: it is 0 "
            "before or behind them, or states are not finite; choose another compensation, or another model.dtype"
        )
    return scale
