"""What compensations are fitted to that act just before a removed run: rows by token, streamed sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svl.core import ROLES, HiddenStates, Plan, SvlError, one_of

Run = tuple[int, int]  # removed layers [start, stop)


@dataclass(frozen=True)
class RunRows:
    """Tokens of one sample beside a removed run: fp32 [T, d] and weights [T].

    Attributes:
        written: M, what the last projection before the run writes (see `anchor_of`).
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


def targets_left(plan: Plan, layer: int, targets: Sequence[str]) -> tuple[str, ...]:
    """Those of the projections `targets` of a kept layer that `plan` leaves it; if none, the one that is left."""
    left = [role for role in ROLES if (layer, role) not in plan.sublayers]
    return tuple(role for role in targets if role in left) or tuple(left)


def anchor_of(plan: Plan, run: Run) -> tuple[int, str]:
    """The projection that fills a run's gap: the last one that writes before it, as (layer, role).

    It is down_proj of the layer before the run, or o_proj where `plan` takes that layer's MLP.
    """
    layer = run[0] - 1
    return layer, targets_left(plan, layer, ("mlp",))[0]


def stream_run_rows(hidden: HiddenStates, plan: Plan, rows: str) -> Iterator[tuple[Run, RunRows]]:
    """The rows of every sample at every run that a layer is before, from one pass through the model that still has
    these runs; with `rows` all, every token has the weight 1.

    Raises:
        SvlError: if the model's layers have no such projection that is known.
    """
    runs = plan.runs_with_layer_before
    anchors = {run: anchor_of(plan, run) for run in runs}
    for _, role in anchors.values():
        one_of("the writer that compensation needs", role, tuple(hidden.writers))
    points = sorted({i for run in runs for i in run})
    for sample in hidden.stream(points, list(anchors.values()), plan.with_layers(())):
        for (start, stop), (layer, role) in anchors.items():
            weights = sample.weights[layer]
            if rows == "all":
                weights = torch.ones_like(weights)
            states = sample.wrote(layer, role), sample.h(start), sample.h(stop)
            yield (start, stop), RunRows(*states, weights, sample.generated)


def notes_on_runs(plan: Plan) -> tuple[str, ...]:
    """What there is to say of runs that no layer is before, or one without its MLP."""
    notes = [] if plan.runs_with_layer_before == plan.runs else ["no layer before layer 0: its run is not compensated"]
    anchors = [anchor_of(plan, run) for run in plan.runs_with_layer_before]
    lacking = [layer for layer, role in anchors if role != "mlp"]
    return (*notes, *(f"layer {layer} has no MLP any more: its attention fills the gap" for layer in lacking))


def check_whole_before_runs(plan: Plan, what: str) -> None:
    """Raise SvlError if a layer that removed ones would go into (`what`, in the message) has lost one of its parts."""
    into = {start - 1 for start, _ in plan.runs_with_layer_before} | {i for i, _ in plan.merges}
    if lacking := [(layer, role) for layer, role in plan.sublayers if layer in into]:
        layer, role = lacking[0]
        raise SvlError(
            f"compensation={what} puts removed layers into layer {layer}, but the plan takes its {role}; choose "
            "another compensation, or leave that layer whole"
        )
