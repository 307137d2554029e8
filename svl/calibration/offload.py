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
from typing import TYPE_CHECKING, Any

import torch

from svl.checkpoints import hub
from svl.checkpoints.pruned_tensors import layer_prefix, prediction_layers
from svl.checkpoints.skeleton import Skeleton, read_skeleton
from svl.core import SvlError
from svl.models import devices, loading
from svl.models.lvlm import Lvlm, Progress
from svl.models.options import LoadOptions
from svl.models.transformers_internals import tie_as_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offloaded(Lvlm):
    """A model whose decoder layers are on disk. It computes through `map` only."""

    skeleton: Skeleton = field(kw_only=True)

    def map(
        self, work: Callable[[Lvlm, Any], Any], batches: Sequence[Any], show: Progress, what: str = ""
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
        empty = [
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
            for parameters, name, param in empty:
                parameters[name] = param


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


def _replica(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules, hooks and config of its own that has the very parameters and buffers of `model`.

    Whole tables of parameters are shared, so that what is later put into the model is in all of its replicas.
    """
    shared: list[Any] = [m._parameters for m in model.modules()]
    shared += [b for m in model.modules() for b in m._buffers.values() if b is not None]
    return copy.deepcopy(model, {id(x): x for x in shared})


def load_offloaded(path: str | Path, options: LoadOptions | None = None, **settings: Any) -> Offloaded:
    """A checkpoint with its decoder layers left on disk; arguments and errors are those of `loading.load`."""
    options = LoadOptions.of(options, settings)
    folder = hub.local_checkpoint(loading.resolve_model_path(path), options.revision)
    local = replace(options, revision=None)  # the folder is that revision
    config, _ = loading.read_model_config(folder, local)
    processor, token = loading.load_processor(folder, config, local)
    skeleton = read_skeleton(folder, local, image_token=token)
    prediction_layers(skeleton, layer_prefix(skeleton))  # raises an error for any other layer behind the last
    return assemble_offloaded(skeleton, processor, options.model_name(path), devices.find_device(options.device))


def assemble_offloaded(skeleton: Skeleton, processor: Any, name: str, device: torch.device | str) -> Offloaded:
    """The offloaded model of a skeleton: all but its decoder layers is read from disk."""
    model, layers = skeleton.model, skeleton.anatomy.layers
    inside = {f"{layers}.{n}" for n, _ in model.get_submodule(layers).named_parameters()}
    skeleton.fill([key for key, place in skeleton.places.items() if place.name not in inside], device)
    tie_as_loaded(model, {place.name for place in skeleton.places.values()})
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer if buffer is None else buffer.to(device)
    log.info("opened %s: %d decoder layers, which stay on disk", name, skeleton.anatomy.n_layers)
    return Offloaded(model, processor, skeleton.anatomy, name, skeleton=skeleton)
