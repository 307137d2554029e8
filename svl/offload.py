"""Calibration of a model that does not fit in memory: decoder layers come from disk one after the other, each once.

All calibration batches go through layer i before layer i + 1 is read. Every batch has a forward pass of its own, in a
thread of its own, on a replica of the model that shares its weights; before each decoder layer it waits until that
layer is there. Only one pass runs at a time. So it is the model's own code that drives, with whatever it does between
layers, and whatever hooks measure: nothing is imitated, and the results are those of a model in memory.

Memory: the model without its decoder layers, one layer, and for every batch what its pass holds on to (the hidden
state; what hooks keep, which for the statistic "windows" and for compensations is many states).
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svl import loading, skeleton
from svl.core import SvlError
from svl.loading import Lvlm, Show
from svl.skeleton import Skeleton

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offloaded(Lvlm):
    """A model whose decoder layers are on disk. It computes through `map` only."""

    skeleton: Skeleton = field(kw_only=True)

    def map(
        self, work: Callable[[Lvlm, Any], Any], batches: Sequence[Any], show: Show, what: str = ""
    ) -> Iterator[Any]:
        """What `work(lvlm, batch)` gives for every batch, in order, from one reading of the layers."""
        passes = [_Pass(self, work, batch) for batch in batches]
        try:
            for one in passes:
                one.go_on()
            for i in show(range(self.anatomy.n_layers), what, self.anatomy.n_layers):
                if not any(one.waiting for one in passes):
                    break  # no one asks about deeper layers
                with self._layer(i):
                    for one in passes:
                        if one.at == i:
                            one.go_on()
                if late := [one.at for one in passes if one.waiting and one.at <= i]:
                    raise SvlError(f"'{self.name}' cannot be offloaded: layer {late[0]} is asked for after layer {i}")
        finally:
            for one in passes:
                one.end()
        while passes:
            yield passes.pop(0).result

    @contextmanager
    def _layer(self, i: int) -> Iterator[None]:
        """Within the block, decoder layer i has its weights."""
        own = [
            (module._parameters, name, param)
            for module in self.layers[i].modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        names = {f"{self.anatomy.layers}.{i}.{name}" for name, _ in self.layers[i].named_parameters()}
        self.skeleton.fill([key for key, place in self.skeleton.places.items() if place.name in names], self.device)
        try:
            yield
        finally:
            for parameters, name, hollow in own:
                parameters[name] = hollow


class _EndedError(BaseException):
    """Raised within a pass that is no longer wanted."""


class _Pass(threading.Thread):
    """One batch on its way through the model; pauses before every decoder layer until told to go on."""

    def __init__(self, lvlm: Offloaded, work: Callable[[Lvlm, Any], Any], batch: Any):
        super().__init__(daemon=True, name="svl offloaded pass")
        replica = replace(lvlm, model=_replica(lvlm.model))
        for i, layer in enumerate(replica.layers):
            layer.register_forward_pre_hook(lambda *_, i=i: self._arrive(i))
        self._work: Callable[[], Any] | None = lambda: work(replica, batch)
        self._turn, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False
        self.at = -1  # the layer that it waits for
        self.waiting = True
        self.result: Any = None

    def go_on(self) -> None:
        """Run up to the next decoder layer, or the end. Raises what the pass raised."""
        if not self.is_alive():
            self.start()
        self._turn.release()
        self._pause.acquire()
        if self._error:
            raise self._error

    def end(self) -> None:
        """Give up, if it is still under way."""
        self._ended = True
        if self.is_alive():
            self._turn.release()
            self.join()

    def run(self) -> None:
        """The thread."""
        self._turn.acquire()
        try:
            if self._work and not self._ended:
                self.result = self._work()
        except _EndedError:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again where it is waited for)
            self._error = error
        self._work, self.waiting = None, False  # its replica may go
        self._pause.release()

    def _arrive(self, i: int) -> None:
        self.at = i
        self._pause.release()
        self._turn.acquire()
        if self._ended:
            raise _EndedError


def _replica(model: nn.Module) -> nn.Module:
    """A copy with modules, hooks and config of its own that has the very parameters and buffers of `model`.

    Whole tables of parameters are shared, so that what is later put into the model is in all of its replicas.
    """
    shared: list[Any] = [m._parameters for m in model.modules()]
    shared += [b for m in model.modules() for b in m._buffers.values() if b is not None]
    return copy.deepcopy(model, {id(x): x for x in shared})


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    layers: str | None = None,
    image_token: int | str | None = None,
    protect: str | Sequence[int] = "auto",
    name: str | None = None,
    trust_remote_code: bool = False,
) -> Offloaded:
    """A checkpoint with its decoder layers left on disk; arguments and errors are those of `loading.load`."""
    folder = skeleton.local(loading.check_source(path, dtype), revision)
    config, auto = loading.describe(folder, None, trust_remote_code)
    processor, token = loading.load_processor(folder, config, auto, image_token, trust_remote_code=trust_remote_code)
    bones = skeleton.build(
        folder, dtype=loading.DTYPES[dtype], layers=layers, image_token=token, protect=protect,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return assemble(bones, processor, name or Path(path).name, loading.find_device(device))


def assemble(bones: Skeleton, processor: Any, name: str, device: torch.device | str) -> Offloaded:
    """The offloaded model of a skeleton: all but its decoder layers is read from disk."""
    model, layers = bones.model, bones.anatomy.layers
    inside = {f"{layers}.{n}" for n, _ in model.get_submodule(layers).named_parameters()}
    bones.fill([key for key, place in bones.places.items() if place.name not in inside], device)
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer if buffer is None else buffer.to(device)
    log.info("opened %s: %d decoder layers, which stay on disk", name, bones.anatomy.n_layers)
    return Offloaded(model, processor, bones.anatomy, name, skeleton=bones)
