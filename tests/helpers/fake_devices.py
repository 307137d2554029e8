"""Accelerators that are not there: tensors of the devices "fake:0" to "fake:2" compute on the CPU, each for itself.

A tensor of a fake device is a wrapper that torch takes to be there; its numbers lie in a tensor of the CPU, so results
are the same on each of them, bit for bit. (The CPU itself has kernels of its own for attention, which round in another
order.) As on real accelerators, an operation on tensors of two devices is an error, unless it copies, or one of them is
a number or an index on the CPU; so is one that makes a dtype which a device lacks.

torch has one slot for a backend from elsewhere, and a process cannot give it back. So `torch.accelerator` knows of the
devices from then on, and says that none is available but within `accelerator`. Gradients work on "fake:0" only: torch's
engine does not ask a backend in Python how many devices there are.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

NAMES = ("fake:0", "fake:1", "fake:2")
CPU = torch.device("cpu")
COPIES = {"aten::copy_", "aten::_to_copy"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}  # by tensors that may lie on the CPU
KEPT: list[Any] = []  # what torch refers to, but does not hold


class State:
    """What the devices are like now: dtypes that they lack, what all they do raises, how many torch is told of."""

    lacks: frozenset[torch.dtype] = frozenset()
    broken: str | None = None
    visible = 0


class FakeTensor(Tensor):
    """A tensor of a fake device around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> FakeTensor:
        size, places = inner.shape, {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, size, **places, dtype=inner.dtype, device=device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"FakeTensor({self.inner}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = FakeTensor(self.inner.clone(), self.device)
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied


@cache
def fake_devices() -> tuple[str, ...]:
    """The names of the devices, which are there from the first call on."""
    if not hasattr(torch._C, "_acc"):
        pytest.skip("this torch takes no backend written in Python")
    torch.utils.rename_privateuse1_backend("fake")
    module: Any = types.ModuleType("torch.fake")
    module.is_available, module.device_count = (lambda: State.visible > 0), (lambda: State.visible)
    module.is_initialized = module.is_built = lambda: True
    module.current_device, module._is_in_bad_fork = (lambda: 0), (lambda: False)
    module.manual_seed_all = lambda seed: None
    module.get_rng_state, module.set_rng_state = (lambda device: torch.zeros(1)), (lambda state, device: None)
    module.device = lambda device: nullcontext()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module("fake", module)
    private_use = torch._C._autograd.DeviceType.PrivateUse1
    guard = type("Guard", (torch._C._acc.DeviceGuard,), {"type_": lambda self: private_use})()
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    answers = {"is_available": lambda self: State.visible > 0, "is_built": lambda self: True,
               "has_primary_context": lambda self, index: True}  # fmt: skip
    hooks = type("Hooks", (torch._C._acc.PrivateUse1Hooks,), answers)()
    torch._C._acc.register_python_privateuseone_hook(hooks)
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    for name in ("_to_copy", "copy_", "lift_fresh", "_local_scalar_dense"):  # torch.tensor goes past the fallback
        func = getattr(torch.ops.aten, name).default
        some.impl(name, lambda *args, func=func, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    KEPT.extend([guard, hooks, everything, some])
    return NAMES


@contextmanager
def accelerator(lacks: tuple[torch.dtype, ...] = (), broken: str | None = None) -> Iterator[str]:
    """Within the block, torch knows one accelerator, a fake device: it lacks dtypes, or fails in all it is asked."""
    name = fake_devices()[0]
    State.lacks, State.broken, State.visible = frozenset(lacks), broken, 1
    try:
        yield name
    finally:
        State.lacks, State.broken, State.visible = frozenset(), None, 0


def on_cpu(value: Any) -> Any:
    """Nested values, tensors of fake devices replaced by those of the CPU."""
    return tree_map(lambda x: x.inner if isinstance(x, FakeTensor) else x, value)


@torch.no_grad()
@torch.inference_mode(False)  # in which wrappers of views could not be made
def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on fake devices, on the CPU."""
    if State.broken:
        raise RuntimeError(State.broken)
    name, given = func._schema.name, []
    inner_args, inner_kwargs = _unwrapped(args, given), {k: _unwrapped(v, given) for k, v in kwargs.items()}
    device = _device_of(name, given)
    result = func(*inner_args, **inner_kwargs)
    if name.endswith("_") and func._schema.is_mutable:
        return args[0]
    return result if device == CPU else _wrapped(result, device, name)


def _unwrapped(x: Any, given: list[Any]) -> Any:
    """What stands for an argument on the CPU; tensors and devices in it are added to `given`."""
    if isinstance(x, tuple | list):
        return type(x)([_unwrapped(part, given) for part in x])
    if isinstance(x, Tensor | torch.device):
        given.append(x)
    if isinstance(x, torch.device):
        return CPU
    return x.inner if isinstance(x, FakeTensor) else x


def _wrapped(x: Any, device: torch.device, name: str) -> Any:
    """What an operation gives, on a device."""
    if isinstance(x, tuple | list):
        return type(x)([_wrapped(part, device, name) for part in x])
    if isinstance(x, Tensor) and x.dtype in State.lacks:
        raise TypeError(f"{device} has no {x.dtype} ({name})")
    return FakeTensor(x, device) if isinstance(x, Tensor) else x


def _device_of(name: str, given: list[Any]) -> torch.device:
    """Where an operation computes; raises RuntimeError if its tensors are on several devices."""
    for asked in given:
        if isinstance(asked, torch.device):
            return CPU if asked.type == "cpu" else torch.device("fake", asked.index or 0)
    if name in COPIES:
        return given[0].device
    fixed = [x for x in given if x.device != CPU or (x.ndim > 0 and (name not in INDEXED or x is given[0]))]
    if len(found := {x.device for x in fixed}) > 1:
        raise RuntimeError(f"{name} of tensors on different devices: {', '.join(sorted(map(str, found)))}")
    return (fixed or given)[0].device
