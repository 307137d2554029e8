"""What compensations are fitted to that act just before a removed run: rows by token, streamed sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svl.core import HiddenStates, Plan, one_of

WRITER = "mlp"  # whose output is changed: down_proj of the layer before the run

Run = tuple[int, int]  # removed layers [start, stop)


@dataclass(frozen=True)
class RunRows:
    """Tokens of one sample beside a removed run: fp32 [T, d] and weights [T].

    Attributes:
        written: M, what the MLP of the layer before the run writes.
        before: h_s, which enters the run.
        after: h_e, which leaves it.
        weights: of the tokens.
        generated: whether the dense model wrote this text.
    """

    written: Tensor
    before: Tensor
    after: Tensor
    weights: Tensor
    generated: bool = False


def check_rows(rows: str) -> None:
    """Raise SvlError unless `rows` says which tokens count: selected (weighted by the selector) or all."""
    one_of("compensation.rows", rows, ("selected", "all"))


def stream_run_rows(hidden: HiddenStates, runs: Sequence[Run], rows: str) -> Iterator[tuple[Run, RunRows]]:
    """The rows of every sample at every run, from one pass; with `rows` all, every token has the weight 1.

    Raises:
        SvlError: if the model's layers have no MLP that writes with one known projection.
    """
    one_of("the writer that compensation needs", WRITER, tuple(hidden.writers))
    points = sorted({i for run in runs for i in run})
    for sample in hidden.stream(points, [(start - 1, WRITER) for start, _ in runs]):
        for start, stop in runs:
            weights = sample.weights[start - 1]
            if rows == "all":
                weights = torch.ones_like(weights)
            states = sample.wrote(start - 1, WRITER), sample.h(start), sample.h(stop)
            yield (start, stop), RunRows(*states, weights, sample.generated)


def notes_on_runs(plan: Plan) -> tuple[str, ...]:
    """A note if a removed run has no layer before it."""
    if plan.runs_with_layer_before == plan.runs:
        return ()
    return ("no layer before layer 0: its run is not compensated",)
