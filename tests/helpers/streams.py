"""Hidden states for compensations: given ones, and those of a model as plain forward passes see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svl.data.samples import Samples
from svl.models.lvlm import Lvlm


@dataclass(frozen=True)
class GivenSample:
    """One sample whose states are given: h_i by i, what projections write by (layer, role), weights [L, T]."""

    states: Mapping[int, Tensor]
    writes: Mapping[tuple[int, str], Tensor]
    weights: Tensor
    generated: bool = False

    def h(self, i: int) -> Tensor:
        return self.states[i]

    def wrote(self, layer: int, writer: str) -> Tensor:
        return self.writes[layer, writer]


@dataclass
class GivenStates:
    """A calibration set of given samples, which counts its passes."""

    n_layers: int
    samples: Sequence[GivenSample]
    writers: Sequence[str] = ("attn", "mlp")
    passes: list[tuple[tuple[int, ...], tuple[tuple[int, str], ...]]] = field(default_factory=list)

    def has_bias(self, layer: int, writer: str) -> bool:
        return False

    def stream_factor(self, layer: int, writer: str) -> float:
        return 1.0

    def stream(self, points=(), writers=(), plan=None, patch=None) -> Iterator[GivenSample]:
        self.passes.append((tuple(points), tuple(writers)))
        yield from self.samples


@dataclass(frozen=True)
class Recorded:
    """What a forward pass of one sample showed: h_0 .. h_L and what projections wrote, fp64 [T, d]."""

    states: list[Tensor]
    writes: dict[tuple[int, str], Tensor]


def record(lvlm: Lvlm, samples: Samples, encode) -> list[Recorded]:
    """Every sample, each from a forward pass of its own."""
    states: list[Tensor] = []
    writes: dict[tuple[int, str], Tensor] = {}

    def keep_states(_, args, out):
        states.extend([args[0], out])

    def keep_write(layer, role):
        def keep(_, args, out):
            writes[layer, role] = out[0].double()

        return keep

    handles = []
    for i, layer in enumerate(lvlm.layers):
        handles.append(layer.register_forward_hook(keep_states))
        for role, writers in lvlm.anatomy.writers.items():
            handles.append(layer.get_submodule(writers[i].module).register_forward_hook(keep_write(i, role)))
    result = []
    for sample in samples:
        with torch.inference_mode():
            lvlm.model(**encode(lvlm, [sample]))
        result.append(Recorded([h[0].double() for h in [*states[::2], states[-1]]], dict(writes)))
        states.clear()
    for handle in handles:
        handle.remove()
    return result
