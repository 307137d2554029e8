"""Ridge regression from a stream of rows: what least-squares compensations share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svl.core import SvlError


class Regression:
    """min_B sum over rows of w |y - x B|^2 + ridge |B|^2, from Gram matrices accumulated in fp64.

    The ridge is relative: a multiple of the mean diagonal of X^T W X, so that it means the same for any number of rows
    and any scale of x. Memory: n_in (n_in + n_out) doubles.
    """

    def __init__(self) -> None:
        self.gram: Tensor | None = None  # X^T W X, [n_in, n_in]
        self.cross: Tensor | None = None  # X^T W Y, [n_in, n_out]
        self.energy = 0.0  # sum of w |y|^2
        self.weight = 0.0

    def add(self, x: Tensor, y: Tensor, w: Tensor) -> None:
        """Rows `x` [T, n_in] and `y` [T, n_out] with weights `w` [T]."""
        x, y, w = x.double(), y.double(), w.double().to(x.device)[:, None]
        weighted = w * x
        gram, cross = x.mT @ weighted, weighted.mT @ y
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross
        self.energy += float((w * y * y).sum())
        self.weight += float(w.sum())

    def with_rows_of(self, other: Regression) -> Regression:
        """The regression on the rows of both, which have some each."""
        both = Regression()
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross  # type: ignore[operator]
        both.energy, both.weight = self.energy + other.energy, self.weight + other.weight
        return both

    def solve(self, ridge: float) -> Tensor:
        """B, fp64 [n_in, n_out].

        Raises:
            SvlError: if there is no row of weight above 0, a number is not finite, or no unique solution exists.
        """
        if self.gram is None or self.cross is None or self.weight == 0:
            raise SvlError("the selector leaves no token for compensation; choose another selector, or rows=all")
        if not bool(self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise SvlError("hidden states are not finite, so nothing can be fitted to them; choose another model.dtype")
        n = len(self.gram)
        scale = self.gram.diagonal().mean()
        system = self.gram + ridge * scale * torch.eye(n, dtype=torch.float64, device=self.gram.device)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) or float(factor.diagonal().min()) ** 2 < n * torch.finfo(torch.float64).eps * float(scale):
            raise SvlError("too few independent tokens for a fit without ridge; set compensation.ridge above 0")
        return torch.cholesky_solve(self.cross, factor)

    def left_over(self, solution: Tensor) -> float:
        """The share of the weighted energy of y that x B with this B does not explain."""
        if self.gram is None or self.cross is None or self.energy == 0:
            return 0.0
        explained = 2 * (solution * self.cross).sum() - (solution * (self.gram @ solution)).sum()
        return 1 - float(explained) / self.energy


class HeldOutRegression:
    """A regression whose ridge is chosen by the error on every `fold`-th sample after a fit to the others.

    Of fewer samples than `fold`, none is held out: the first ridge is taken, as it is if there is no other.
    """

    def __init__(self, ridges: Sequence[float], fold: int) -> None:
        self.ridges, self.fold = ridges, fold
        self.fitted, self.held_out = Regression(), Regression()
        self.n_samples = 0

    def add_sample(self, x: Tensor, y: Tensor, w: Tensor) -> None:
        """The rows of one sample: `x` [T, n_in], `y` [T, n_out], weights `w` [T]."""
        self.n_samples += 1
        part = self.held_out if self.n_samples % self.fold == 0 else self.fitted
        part.add(x, y, w)

    def solve(self) -> tuple[Tensor, str]:
        """B, fp64 [n_in, n_out], fitted to all samples with the chosen ridge; and a note that names this ridge and the
        share of the energy of y that B leaves. Raises as `Regression.solve` does."""
        ridge, both = self.ridges[0], self.fitted
        if self.held_out.gram is not None:
            both = self.fitted.with_rows_of(self.held_out)
            if len(self.ridges) > 1:
                ridge = min(self.ridges, key=lambda r: self.held_out.left_over(self.fitted.solve(r)))
        solution = both.solve(ridge)
        return solution, f"ridge {ridge:g}, {both.left_over(solution):.0%} of the gap left"


def check_ridges(ridges: Sequence[float], fold: int) -> None:
    """Raise SvlError unless `ridges` and `fold` are settings of a `HeldOutRegression`."""
    if not ridges or min(ridges) <= 0:
        raise SvlError("compensation.ridges must be numbers above 0")
    if fold < 2:
        raise SvlError(f"compensation.fold is {fold}, but must be at least 2")
