"""Ridge regression from a stream of rows: what least-squares compensations share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from svl.core import SvlError, check_count

BLOCK = 2048  # rows or columns of a large matrix that are computed at once


class Regression:
    """min_B sum over rows of w |y - x B|^2 + ridge |B|^2, from Gram matrices accumulated in fp64.

    The ridge is relative: a multiple of the mean diagonal of X^T W X, so that it means the same for any number of rows
    and any scale of x. Memory: n_in (n_in + n_out) doubles, and 2 n_in^2 more while it is solved.
    """

    def __init__(self) -> None:
        self.gram: Tensor | None = None  # X^T W X, [n_in, n_in]
        self.cross: Tensor | None = None  # X^T W Y, [n_in, n_out]
        self.energy = 0.0  # sum of w |y|^2
        self.weight = 0.0
        self.rows = 0  # of weight above 0

    def add(self, x: Tensor, y: Tensor, w: Tensor) -> None:
        """Rows `x` [T, n_in] and `y` [T, n_out] with weights `w` [T]."""
        x, y, w = x.double(), y.double(), w.double().to(x.device)[:, None]
        weighted = w * x
        if self.gram is None or self.cross is None:
            self.gram, self.cross = x.mT @ weighted, weighted.mT @ y
        else:
            _add_product(self.gram, x.mT, weighted)
            _add_product(self.cross, weighted.mT, y)
        self.energy += float((w * y * y).sum())
        self.weight += float(w.sum())
        self.rows += int((w > 0).sum())

    @property
    def reads_nothing(self) -> bool:
        """Whether all rows of x are 0, so that no B makes a difference."""
        return self.gram is not None and not bool(self.gram.any())

    def take_rows_of(self, other: Regression) -> None:
        """Add the rows of another regression, which has some, to those that are here."""
        self.gram += other.gram  # type: ignore[operator]
        self.cross += other.cross  # type: ignore[operator]
        self.energy += other.energy
        self.weight += other.weight
        self.rows += other.rows

    def solve(self, ridge: float) -> Tensor:
        """B, fp64 [n_in, n_out]; 0 for an infinite ridge, and where all rows of x are 0, which no B can change.

        Raises:
            SvlError: if there is no row of weight above 0, a number is not finite, or no unique solution exists.
        """
        if self.gram is None or self.cross is None or self.weight == 0:
            raise SvlError("the selector leaves no token for compensation; choose another selector, or rows=all")
        if not bool(self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise SvlError("hidden states are not finite, so nothing can be fitted to them; choose another model.dtype")
        if ridge == math.inf or self.reads_nothing:
            return torch.zeros_like(self.cross)
        n = len(self.gram)
        scale = self.gram.diagonal().mean()
        system = self.gram.clone()
        system.diagonal().add_(ridge * scale)
        factor, info = torch.linalg.cholesky_ex(system)
        del system  # of the size of the Gram matrix, which counts where n_in is an MLP's width
        if int(info) or float(factor.diagonal().min()) ** 2 < n * torch.finfo(torch.float64).eps * float(scale):
            if ridge > 0:
                raise SvlError(f"too few independent tokens for a fit with a ridge of {ridge:g}; choose a larger one")
            raise SvlError("too few independent tokens for a fit without ridge; set compensation.ridge above 0")
        return torch.cholesky_solve(self.cross, factor)

    def left_over(self, solution: Tensor) -> float:
        """The share of the weighted energy of y that x B with this B does not explain."""
        if self.gram is None or self.cross is None or self.energy == 0:
            return 0.0
        explained = 0.0
        for b, cross in zip(solution.split(BLOCK, 1), self.cross.split(BLOCK, 1), strict=True):
            explained += float(2 * (b * cross).sum() - (b * (self.gram @ b)).sum())
        return 1 - explained / self.energy


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left` @ `right` to `total` in place, by blocks of rows: no second matrix of its size is made."""
    for here, rows in zip(total.split(BLOCK), left.split(BLOCK), strict=True):
        here += rows @ right


class Halves:
    """A regression on given samples and on generated texts that weighs both halves equally, row for row."""

    def __init__(self) -> None:
        self.halves: dict[bool, Regression] = {}  # by whether it was generated

    def add(self, x: Tensor, y: Tensor, w: Tensor, generated: bool) -> None:
        """The rows of one sample: `x` [T, n_in], `y` [T, n_out], weights `w` [T]."""
        self.halves.setdefault(generated, Regression()).add(x, y, w)

    def whole(self) -> Regression:
        """The regression on both, rows of each half divided by how many there are.

        A half alone is left as it is; one without rows of weight above 0 stands for both, as nothing can be fitted.
        """
        parts = sorted(self.halves.values(), key=lambda half: half.rows)
        if len(parts) < 2 or not parts[0].rows:
            return parts[0] if parts else Regression()
        total = Regression()
        total.gram = sum(half.gram / half.rows for half in parts)  # type: ignore
        total.cross = sum(half.cross / half.rows for half in parts)  # type: ignore
        total.energy = sum(half.energy / half.rows for half in parts)
        total.weight = sum(half.weight / half.rows for half in parts)
        total.rows = sum(half.rows for half in parts)
        return total

    def left_over(self, solution: Tensor) -> float:
        """The larger of the shares of the halves' weighted energy of y that x B with this B does not explain."""
        return max(half.left_over(solution) for half in self.halves.values())

    @property
    def rows(self) -> int:
        """How many rows of weight above 0 there are."""
        return sum(half.rows for half in self.halves.values())

    @property
    def has_rows(self) -> bool:
        """Whether there are rows of weight above 0, in each half that there is."""
        return bool(self.halves) and all(half.rows for half in self.halves.values())

    def take_rows_of(self, other: Halves, generated: bool) -> None:
        """Move the rows of one half of `other` to the same half here."""
        if (half := other.halves.pop(generated, None)) is None:
            return
        if generated in self.halves:
            self.halves[generated].take_rows_of(half)
        else:
            self.halves[generated] = half


class HeldOutRegression:
    """A regression whose ridge is chosen by the error on every `fold`-th sample after a fit to the others.

    Of n < `fold` samples, the last one is held out; of equals, the larger ridge is taken. Given samples and generated
    texts weigh the same, and the error is the larger one of theirs. An infinite ridge is the fit that changes nothing.
    Where nothing can be held out, or fitted to what is left, as of a single sample, the largest ridge is taken: it
    changes least. One ridge alone is taken as it is.
    """

    def __init__(self, ridges: Sequence[float], fold: int) -> None:
        self.ridges, self.fold = sorted(ridges, reverse=True), fold
        self.fitted, self.held_out = Halves(), Halves()
        self.n_samples = {False: 0, True: 0}
        self.how = ""  # the ridge was chosen, where that is not as usual

    def add_sample(self, x: Tensor, y: Tensor, w: Tensor, generated: bool) -> None:
        """The rows of one sample: `x` [T, n_in], `y` [T, n_out], weights `w` [T]."""
        self.n_samples[generated] += 1
        n = self.n_samples[generated]
        if n <= self.fold:  # there may be no more of them, so the last one is held out until there are
            self.fitted.take_rows_of(self.held_out, generated)
        part = self.held_out if n <= self.fold or n % self.fold == 0 else self.fitted
        part.add(x, y, w, generated)

    def solve(self) -> tuple[Tensor, str]:
        """B, fp64 [n_in, n_out], fitted to all samples with the chosen ridge; and a note that names this ridge and the
        share of the energy of y that B leaves. Raises as `Regression.solve` does."""
        if len(self.ridges) > 1:
            self.ridges = [self._choose()]  # solved again, it is the same
        for generated in (False, True):
            self.fitted.take_rows_of(self.held_out, generated)
        whole, ridge = self.fitted.whole(), self.ridges[0]
        solution = whole.solve(ridge)
        return solution, f"ridge {ridge:g}{self.how}, {whole.left_over(solution):.0%} of the gap left"

    def _choose(self) -> float:
        """The ridge of least error on what is held out."""
        n = self.n_samples[False] + self.n_samples[True]
        if not (self.fitted.has_rows and self.held_out.rows):
            self.how = f" (the largest: {n} sample{'s' * (n != 1)} can tell none from another)"
            return self.ridges[0]
        if n < self.fold:
            self.how = f" (by the last of {n} samples)"
        seen = self.fitted.whole()
        return min(self.ridges, key=lambda ridge: self.held_out.left_over(seen.solve(ridge)))


def check_ridges(ridges: Sequence[float], fold: int) -> None:
    """Raise SvlError unless `ridges` and `fold` are settings of a `HeldOutRegression`."""
    if not ridges or not all(isinstance(ridge, int | float) and ridge > 0 for ridge in ridges):  # NaN is not, either
        raise SvlError(f"compensation.ridges is {list(ridges)}, but must be numbers above 0 (infinity: no change)")
    check_count("compensation.fold", fold, least=2)
