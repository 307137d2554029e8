"""The leading directions of feature gaps: what SCP and its relatives are made of, and the guard around it.

A gap row h_p - h_r is what removed layers would have added to one token. H stacks the weighted rows of the calibration
set; only its Gram matrix H^T W H (fp64, d x d) is kept.

The guard: some layers write a massive activation (arXiv 2402.17762) to a few tokens, a hundred times larger than what
they write to others. If V, the leading directions of H, overlaps with it, amplifying V amplifies an attention sink by
far more than any gap is wide. Such a direction is found in what the layer writes, to all tokens, and left out of V.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svl.core import HiddenStates, Plan, SvlError, check_number

Points = tuple[int, int]  # (p, r) of a gap row h_p - h_r


class GapGram:
    """H^T W H of gap rows, and what centring takes, accumulated in fp64."""

    def __init__(self) -> None:
        self.gram = torch.zeros(())  # [d, d]
        self.total = torch.zeros(())  # sum of weighted rows, [d]
        self.weight = 0.0

    def add(self, gap: Tensor, weights: Tensor) -> None:
        """Rows `gap` [T, d] with weights [T]."""
        gap = gap.double()
        weighted = weights.double()[:, None] * gap
        self.gram = self.gram + gap.mT @ weighted
        self.total = self.total + weighted.sum(0)
        self.weight += float(weights.double().sum())

    def add_mean(self, gap: Tensor, weights: Tensor) -> None:
        """One row: the weighted mean of `gap` [T, d]; none if all weights [T] are 0."""
        if float(weights.sum()) > 0:
            mean = (weights.double() @ gap.double()) / weights.double().sum()
            self.add(mean[None], torch.ones(1, device=gap.device))

    def matrix(self) -> Tensor:
        """H^T W H, [d, d].

        Raises:
            SvlError: if there is no row of weight above 0, or a number is not finite.
        """
        if self.weight == 0:
            raise SvlError("the selector leaves no token for compensation; choose another selector or rows=all")
        if not bool(self.gram.isfinite().all()):
            raise SvlError("hidden states are not finite, so they span nothing; choose another model.dtype")
        return self.gram

    def centered_matrix(self) -> Tensor:
        """The same of H minus its mean row. Raises as `matrix` does."""
        return self.matrix() - torch.outer(self.total, self.total) / self.weight


@dataclass(frozen=True)
class MassiveWrite:
    """A massive activation that a projection writes.

    Attributes:
        direction: fp64 [d], of norm 1: the leading right singular vector of the rows above the guard.
        ratio: norm of the largest row over the median norm.
    """

    direction: Tensor
    ratio: float

    def note(self, layer: int, role: str) -> str:
        """What a patch notes where such a direction was left out."""
        size = f"up to {self.ratio:.1f} times its median norm"
        return f"{role} of layer {layer} writes {size}: the guard leaves that direction out"


def check_guard(guard: float | None) -> None:
    """Raise SvlError unless `guard` is a possible setting."""
    check_number("compensation.guard", guard, least=1, unless="no guard")


def measure_gaps(
    hidden: HiddenStates,
    points: Mapping[int, Sequence[Points]],
    rows: str,
    writers: Collection[tuple[int, str]],
    base: Plan,
) -> tuple[dict[int, GapGram], dict[tuple[int, str], Tensor]]:
    """One pass over the calibration set: gaps by anchor layer, and the norms of what `writers` write.

    Args:
        hidden: the calibration set's states.
        points: anchor layer -> the gaps to stack there.
        rows: selected (one row per token, weighted by the selector at the anchor) | all (every token) | means (the
            selected tokens' mean, one row per sample).
        writers: (layer, role) of projections.
        base: what the model lacks before any gap (`Plan.with_layers`).

    Returns:
        The Gram matrix of every anchor, and norms fp64 [N] of every writer, N being the number of tokens.
    """
    grams = {anchor: GapGram() for anchor in points}
    norms: dict[tuple[int, str], list[Tensor]] = {writer: [] for writer in writers}
    states = sorted({i for pairs in points.values() for pair in pairs for i in pair})
    for sample in hidden.stream(states, list(writers), base):
        for anchor, pairs in points.items():
            for p, r in pairs:
                gap = sample.h(p) - sample.h(r)
                weights = sample.weights[anchor]
                if rows == "means":
                    grams[anchor].add_mean(gap, weights)
                else:
                    grams[anchor].add(gap, torch.ones_like(weights) if rows == "all" else weights)
        for layer, role in writers:
            norms[layer, role].append(torch.linalg.vector_norm(sample.wrote(layer, role).double(), dim=-1))
    return grams, {writer: torch.cat(parts) for writer, parts in norms.items()}


def find_massive_writes(
    hidden: HiddenStates, norms: Mapping[tuple[int, str], Tensor], guard: float, base: Plan
) -> dict[tuple[int, str], MassiveWrite]:
    """The massive activations of projections, by (layer, role); of most projections there is none.

    Takes one more pass over the calibration set if there is any.

    Args:
        hidden: the calibration set's states.
        norms: what `measure_gaps` gives.
        guard: how many times its median norm a projection must write to some token.
        base: as of `measure_gaps`.
    """
    limits = {writer: guard * values.median() for writer, values in norms.items()}
    found = [writer for writer, values in norms.items() if bool(values.max() > limits[writer])]
    if not found:
        return {}
    grams = {writer: GapGram() for writer in found}
    for sample in hidden.stream(writers=found, plan=base):
        for layer, role in found:
            written = sample.wrote(layer, role).double()
            massive = torch.linalg.vector_norm(written, dim=-1) > limits[layer, role]
            grams[layer, role].add(written, massive.double())
    return {
        writer: MassiveWrite(
            torch.linalg.eigh(grams[writer].matrix()).eigenvectors[:, -1],
            float(norms[writer].max() / norms[writer].median()),
        )
        for writer in found
    }


def leading_directions(matrix: Tensor, rank: int, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of P `matrix` P, with P = I - q q^T and q = `left_out` (P = I if None).

    Directions that only rounding tells from 0 are not given.

    Args:
        matrix: symmetric, fp64 [d, d].
        rank: number of directions, at most.
        left_out: fp64 [d], of norm 1.

    Returns:
        V, fp64 [d, k] with k <= `rank`, and all eigenvalues, fp64 [d], descending.

    Raises:
        SvlError: if `rank` exceeds d.
    """
    if rank > len(matrix):
        raise SvlError(f"compensation.rank is {rank}, but the model is only {len(matrix)} wide")
    noise = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.trace()
    if left_out is not None:
        matrix = matrix - torch.outer(left_out, left_out @ matrix)
        matrix = matrix - torch.outer(matrix @ left_out, left_out)
    values, vectors = torch.linalg.eigh(matrix)
    k = min(rank, int((values > noise).sum()))
    return vectors.flip(1)[:, :k], values.flip(0)
