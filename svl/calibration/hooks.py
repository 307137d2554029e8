"""Hooks that watch decoder layers during a forward pass."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from svl.calibration.row_count import add_rows, is_counting
from svl.core import ROLES, SvlError, one_of
from svl.core.errors import reason_of
from svl.models.layer_calls import first_argument, first_output, hooked
from svl.models.lvlm import Lvlm
from svl.models.positions import looked_up_positions

log = logging.getLogger(__name__)


@cache
def fused_kernels(device: torch.device, dtype: torch.dtype = torch.float32, d: int = 16) -> ModuleType | None:
    """`svl.calibration.kernels`, if they run on a device; None elsewhere, with a warning where they should run.

    They need Triton, which comes with PyTorch's CUDA builds, a C compiler, by which it reaches the device, and memory
    on the device's chip for heads of size `d`. They are tried out once.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        from svl.calibration import kernels

        ones = torch.ones(1, 1, 16, d, device=device, dtype=dtype)
        kernels.row_cosines(ones, ones).sum().item()
        kernels.attention_sums(ones, ones, None, True, 1.0, torch.ones(1, 2, 16, device=device))[0].sum().item()
    except Exception as error:  # noqa: BLE001 (whatever Triton, a compiler or a driver raises)
        what = f"in {dtype} with heads of size {d} on '{device}'"
        log.warning("fused kernels do not run %s, so calibration is slower: %s", what, reason_of(error))
        return None
    return kernels


class EnoughError(Exception):
    """Raised by the last hook: the rest of the forward pass is not needed."""


def run_decoder(lvlm: Lvlm, inputs: dict[str, Tensor], all_logits: bool = False) -> Any:
    """The model's output for `inputs`: its layers on all positions, logits of the last one where it can be told so.

    Rows through layers are counted, where `counted_rows` asks for it.
    """
    takes_number = "logits_to_keep" in inspect.signature(lvlm.model.forward).parameters
    # an index (on no device): told a number, models whose last layers reuse keys and values run these on that many
    # positions alone
    few = {} if all_logits or not takes_number else {"logits_to_keep": [-1]}
    with hooked(_row_hooks(lvlm) if is_counting() else ()):
        return lvlm.model(**inputs, **looked_up_positions(lvlm, inputs), use_cache=False, **few)


def _row_hooks(lvlm: Lvlm) -> Iterator[Any]:
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        add_rows(first_argument(args, kwargs).shape[-3])

    return (layer.register_forward_pre_hook(count, with_kwargs=True) for layer in lvlm.layers)


@contextmanager
def cosine_hooks(lvlm: Lvlm, cosines: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put cos(h_i, h_{i+1}) [B, T] (fp32) into `cosines[i]`, if layer i runs."""
    cosine_of = _RowCosines()

    def hook(i: int) -> Callable[..., None]:
        def measure_cosine(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            cosines[i] = cosine_of(first_argument(args, kwargs), first_output(output))

        return measure_cosine

    with hooked(layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(lvlm.layers)):
        yield


class _RowCosines:
    """Cosines [B, T] of states [B, T, d] that follow each other, in fp32 on the device of the later; 0 for zero states.

    In one reading of both on CUDA; elsewhere a state is widened once, though it leaves one layer and enters the next.
    """

    def __init__(self) -> None:
        self._newest: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        if kernels := fused_kernels(after.device):
            cosines: Tensor = kernels.row_cosines(before.to(after.device), after)
            return cosines
        wide, size = (x.to(after.device) for x in self._widened(before))
        wide_after, size_after = self._widened(after)
        return torch.linalg.vecdot(wide, wide_after) / (size * size_after).clamp(min=torch.finfo(torch.float32).tiny)

    def _widened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A state in fp32, and the norms of its vectors."""
        if self._newest is None or self._newest[0] is not x:
            wide = x.float()
            self._newest = (x, (wide, torch.linalg.vector_norm(wide, dim=-1)))
        return self._newest[1]


@contextmanager
def sublayer_hooks(lvlm: Lvlm, cosines: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put cos(x, x + f(x)) of attention and MLP [B, 2, T] (fp32) into `cosines[i]`.

    Where a state is not finite, or too large for a norm in fp32, so is the cosine: statistics are refused, then.

    Raises:
        SvlError: if layers have no such two parts, or add something else to the residual stream than they write.
    """
    written: dict[str, Tensor] = {}
    for role in ROLES:
        one_of("the writer that this statistic needs", role, tuple(lvlm.anatomy.writers))

    def keep(role: str) -> Callable[..., None]:
        return lambda _, args, output: written.__setitem__(role, first_output(output).float())

    def hook(i: int) -> Callable[..., None]:
        def measure(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            eps = torch.finfo(first_output(output).dtype).eps
            after = first_output(output).float()
            before = first_argument(args, kwargs).to(after.device).float()  # the layer's own
            attention, mlp = (written.pop(role).to(after.device).reshape(before.shape) for role in ROLES)
            if not adds_up(before, attention, mlp, after, eps):
                raise SvlError(f"layer {i} of '{lvlm.name}' adds something else than attention and MLP write")
            pairs = ((before, before + attention), (after - mlp, after))
            measured = torch.stack([nn.functional.cosine_similarity(*pair, dim=-1) for pair in pairs], 1)
            finite = torch.stack([torch.linalg.vector_norm(x, dim=-1).isfinite() for pair in pairs for x in pair]).all(
                0
            )
            cosines[i] = measured.where(finite[:, None], torch.nan)

        return measure

    def handles() -> Iterator[Any]:
        for i, layer in enumerate(lvlm.layers):
            for role in ROLES:
                writer = layer.get_submodule(lvlm.anatomy.writers[role][i].module)
                yield writer.register_forward_hook(keep(role))
            yield layer.register_forward_hook(hook(i), with_kwargs=True)

    with hooked(handles()):
        yield


def adds_up(before: Tensor, attention: Tensor, mlp: Tensor, after: Tensor, eps: float) -> bool:
    """Whether before + attention + mlp is `after`, token by token: fp32 [B, T, d].

    Up to 2 % of what the two write, beyond the rounding of two additions in a dtype of this `eps`, channel by channel:
    a massive activation hides nothing of other channels or tokens. States that are not finite tell nothing.
    """
    between = before + attention
    rounding = eps * (between.abs() + after.abs())
    wrong = ((between + mlp - after).abs() - rounding).clamp(min=0)
    error, written = (torch.linalg.vector_norm(x, dim=-1) for x in (wrong, torch.stack([attention, mlp])))
    return not bool((error > 0.02 * written.sum(0)).any())


@contextmanager
def state_hooks(lvlm: Lvlm, points: Sequence[int], states: dict[int, Tensor], stop: bool = False) -> Iterator[None]:
    """Within the block, forward passes put h_i into `states`; with `stop`, EnoughError ends them at the deepest.

    A layer that does not run (cross-attention, without an image) passes on its input: h_i is what enters the next.
    """
    waiting: list[int] = []

    def keep(i: int, state: Tensor) -> None:
        while waiting and waiting[0] <= i:
            states[waiting.pop(0)] = state
        if stop and not waiting:
            raise EnoughError

    def handles() -> Iterator[Any]:
        yield lvlm.model.register_forward_pre_hook(lambda *_: waiting.__setitem__(slice(None), points))
        for i, layer in enumerate(lvlm.layers):
            yield layer.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: keep(i, first_argument(args, kwargs)), with_kwargs=True
            )
        n = lvlm.anatomy.n_layers
        yield lvlm.layers[-1].register_forward_hook(lambda _, args, output: keep(n, first_output(output)))

    with hooked(handles()):
        yield


@contextmanager
def writer_hook(module: nn.Module, key: Any, reads: dict[Any, Tensor], writes: dict[Any, Tensor]) -> Iterator[None]:
    """Within the block, forward passes put what `module` reads and writes under `key`."""

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        reads[key], writes[key] = first_argument(args, kwargs), first_output(output)

    with hooked([module.register_forward_hook(keep, with_kwargs=True)]):
        yield
