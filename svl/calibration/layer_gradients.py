"""How steeply a loss changes with each layer's weights, one layer at a time.

A gradient of a whole decoder takes twice its memory in fp32. Here the backward pass stops at every layer: the slope of
the loss by the state that leaves it is enough to go on. States that enter layers are recomputed, segment by segment,
from those kept at about sqrt(L) depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svl.models.devices import fp64_device
from svl.pruning.cut_maps import CutMap

T = TypeVar("T")


class Scored(Protocol):
    """A sample, the state [1, T, d] that enters the first of the layers, and what is to be predicted where."""

    @property
    def state(self) -> Tensor: ...

    positions: Tensor  # [n], whose logits predict
    targets: Tensor  # [n], these tokens


S = TypeVar("S", bound=Scored)
Run = Callable[[int, Tensor, S], Tensor]  # what a layer makes of a sample's state


def taylor_salience(
    layers: Sequence[tuple[int, nn.Module]],
    samples: Sequence[S],
    run: Run[S],
    logits: Callable[[Tensor], Tensor],
    show: Callable[[Sequence[S]], Iterable[S]],
) -> list[float]:
    """Of each layer, the sum over its weights (norms, not biases) of |W * sum over samples of dloss/dW|.

    The loss is the cross-entropy (nats) of all targets, averaged over them. Two forward passes and a backward pass; in
    memory are one layer's gradients in fp32, and for every token about 2 sqrt(L) states.

    Args:
        layers: (number, layer), in the order in which states go through them.
        samples: what the loss is of.
        run: `run(number, state, sample)` gives the state that leaves a layer.
        logits: of states [n, d] that leave the last layer.
        show: wraps the samples' first pass for a progress display.
    """
    size = math.ceil(math.sqrt(len(layers)))
    segments = [layers[i : i + size] for i in range(0, len(layers), size)]
    entering: list[list[Tensor]] = [[] for _ in segments]  # by segment, then by sample
    slopes: list[Tensor] = []  # of the loss, by the state that leaves the layer at hand
    n_targets = sum(len(sample.targets) for sample in samples)
    for sample in show(samples):
        state = sample.state
        for states, segment in zip(entering, segments, strict=True):
            states.append(state)
            for i, _ in segment:
                state = _without_gradient(run, i, state, sample)
        slopes.append(_slope_of_loss(state, sample, logits, n_targets))
    found: list[float] = []
    while segments:
        segment, starts = segments.pop(), entering.pop()
        states_of = [list(_states_in(segment, s, sample, run)) for s, sample in zip(starts, samples, strict=True)]
        for i, layer in reversed(segment):
            found.append(_step_back(i, layer, [states.pop() for states in states_of], samples, run, slopes))
    return found[::-1]


@torch.no_grad()
def _without_gradient(run: Run[S], i: int, state: Tensor, sample: S) -> Tensor:
    return run(i, state, sample)


def _slope_of_loss(state: Tensor, sample: Scored, logits: Callable[[Tensor], Tensor], n_targets: int) -> Tensor:
    """The gradient [1, T, d] of a sample's part of the loss by the state that leaves the last layer."""
    with torch.enable_grad():
        state = state.detach().requires_grad_(True)
        predicted = logits(state[0, sample.positions.to(state.device)]).float()
        loss = F.cross_entropy(predicted, sample.targets.to(predicted.device), reduction="sum") / n_targets
        return torch.autograd.grad(loss, state)[0]


def _states_in(segment: Sequence[tuple[int, nn.Module]], state: Tensor, sample: S, run: Run[S]) -> Iterator[Tensor]:
    """The states that enter the layers of a segment."""
    for i, _ in segment[:-1]:
        yield state
        state = _without_gradient(run, i, state, sample)
    yield state


def _step_back(
    i: int, layer: nn.Module, entering: Sequence[Tensor], samples: Sequence[S], run: Run[S], slopes: list[Tensor]
) -> float:
    """A layer's salience; `slopes` become those by the states `entering` it."""
    weights = [p for _, p in layer_weights(layer)]
    sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    with _trainable(weights), torch.enable_grad():
        for k, sample in enumerate(samples):
            state = entering[k].detach().requires_grad_(True)
            leaving = run(i, state, sample)
            slopes[k], *gradients = torch.autograd.grad(leaving, [state, *weights], slopes[k].to(leaving.device))
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
    return sum(size_of(w.detach().float() * total) for w, total in zip(weights, sums, strict=True))


def size_of(tensor: Tensor, power: int = 1) -> float:
    """The sum of |x|^power over all numbers of a tensor, in fp64."""
    return float(tensor.abs().pow(power).to(fp64_device(tensor.device)).sum(dtype=torch.float64))


def layer_weights(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A layer's weights with their names: matrices and norms, not biases, and no map of a cut before or behind it."""
    maps = tuple(f"{name}." for name, module in layer.named_children() if isinstance(module, CutMap))
    return [
        (name, p) for name, p in layer.named_parameters() if not name.endswith("bias") and not name.startswith(maps)
    ]


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.requires_grad_(value)
