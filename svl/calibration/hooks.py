"""Hooks that watch decoder layers during a forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svl.core import SvlError, one_of
from svl.models.lvlm import Lvlm


class EnoughError(Exception):
    """Raised by the last hook: the rest of the forward pass is not needed."""


def run_decoder(lvlm: Lvlm, inputs: dict[str, Tensor]) -> None:
    """The decoder's layers on `inputs`; logits of one position only, where the model can be told so."""
    takes_number = "logits_to_keep" in inspect.signature(lvlm.model.forward).parameters
    lvlm.model(**inputs, use_cache=False, **({"logits_to_keep": 1} if takes_number else {}))


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a module is called with."""
    return args[0] if args else kwargs["hidden_states"]


def first_output(output: Any) -> Tensor:
    """The hidden state that a module gives out, alone or before others."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def cosine_hooks(lvlm: Lvlm, cosines: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put cos(h_i, h_{i+1}) [B, T] (fp32) into `cosines[i]`."""
    last: list[tuple[Tensor, Tensor]] = []  # the newest state and its norms: what leaves layer i enters layer i + 1

    def norm(x: Tensor) -> Tensor:
        if last and last[0][0] is x:
            return last[0][1]
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)

    def hook(i: int) -> Callable[..., None]:
        def measure_cosine(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = first_argument(args, kwargs), first_output(output)
            product = norm(before)
            last[:] = [(after, norm(after))]
            dot = torch.linalg.vecdot(before.float(), after.float())
            cosines[i] = dot / (product * last[0][1]).clamp(min=torch.finfo(torch.float32).tiny)  # 0 for zero states

        return measure_cosine

    with hooked(layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(lvlm.layers)):
        yield


@contextmanager
def sublayer_hooks(lvlm: Lvlm, cosines: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put cos(x, x + f(x)) of attention and MLP [B, 2, T] (fp32) into `cosines[i]`.

    Raises:
        SvlError: if layers have no such two parts, or add something else to the residual stream than they write.
    """
    roles, written = ("attn", "mlp"), dict[str, Tensor]()
    for role in roles:
        one_of("the writer that this statistic needs", role, tuple(lvlm.anatomy.writers))

    def keep(role: str) -> Callable[..., None]:
        return lambda _, args, output: written.__setitem__(role, first_output(output).float())

    def hook(i: int) -> Callable[..., None]:
        def measure(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = first_argument(args, kwargs).float(), first_output(output).float()
            attention, mlp = (written.pop(role).reshape(before.shape) for role in roles)
            if not torch.allclose(before + attention + mlp, after, rtol=2e-2, atol=2e-2 * float(after.abs().max())):
                raise SvlError(f"layer {i} of '{lvlm.name}' adds something else than attention and MLP write")
            pairs = ((before, before + attention), (after - mlp, after))
            cosines[i] = torch.stack([nn.functional.cosine_similarity(*pair, dim=-1) for pair in pairs], 1)

        return measure

    def handles() -> Iterator[Any]:
        for i, layer in enumerate(lvlm.layers):
            for role in roles:
                writer = layer.get_submodule(lvlm.anatomy.writers[role][i].module)
                yield writer.register_forward_hook(keep(role))
            yield layer.register_forward_hook(hook(i), with_kwargs=True)

    with hooked(handles()):
        yield


@contextmanager
def state_hooks(lvlm: Lvlm, points: Sequence[int], states: dict[int, Tensor], stop: bool = False) -> Iterator[None]:
    """Within the block, forward passes put h_i into `states`; with `stop`, EnoughError ends them at the deepest."""

    def keep(i: int, state: Tensor) -> None:
        states[i] = state
        if stop and i == points[-1]:
            raise EnoughError

    def handles() -> Iterator[Any]:
        for i in points:
            if i < lvlm.anatomy.n_layers:
                yield lvlm.layers[i].register_forward_pre_hook(
                    lambda _, args, kwargs, i=i: keep(i, first_argument(args, kwargs)), with_kwargs=True
                )
            else:
                yield lvlm.layers[-1].register_forward_hook(lambda _, args, output, i=i: keep(i, first_output(output)))

    with hooked(handles()):
        yield


@contextmanager
def writer_hook(module: nn.Module, key: Any, reads: dict[Any, Tensor], writes: dict[Any, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put what `module` reads and writes under `key`."""

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        reads[key], writes[key] = first_argument(args, kwargs), first_output(output)

    with hooked([module.register_forward_hook(keep, with_kwargs=True)]):
        yield


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Within the block, hooks are in place; afterwards they are gone."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
