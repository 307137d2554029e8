"""Models that lie on several devices, or partly on the host or on disk: accelerate's hooks, and what they mean here.

accelerate replaces the `forward` of modules: the hook of a module first moves its arguments to where it computes; of an
offloaded module, it also fetches the tensors, which are on the meta device in between. So a decoder layer may be called
with a state from anywhere, and gives one where it computes; a model takes its inputs, and gives its logits, at
`input_device`. All that knows these hooks is here.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from collections import ChainMap
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError, explained
from svl.models.options import LoadOptions

# ------------------------------------------------------------------------------------------------------- loading


def weights_by_place(model: nn.Module, places: Mapping[str, str | int]) -> dict[str | int, int]:
    """Bytes of a model's weights, which need no values, by where a device map puts them.

    Raises:
        SvlError: if the map leaves weights out, or names something that is no device.
    """
    for place in places.values():
        if place != "disk":
            with explained(f"model.device_map names '{place}'"):
                torch.device(place)
    sizes: dict[str | int, int] = dict.fromkeys(places.values(), 0)
    left_out = []
    for name, tensor in model.state_dict().items():
        entries = [entry for entry in places if entry in ("", name) or name.startswith(f"{entry}.")]
        if entries:
            sizes[places[max(entries, key=len)]] += tensor.nbytes
        else:
            left_out.append(name)
    if left_out:
        raise SvlError(f"model.device_map has no place for {len(left_out)} weights, {left_out[0]} for one")
    return sizes


def load_spread(load: Callable[..., tuple[Any, Any]], options: LoadOptions) -> tuple[Any, Any]:
    """What `load(device_map=, max_memory=, offload_folder=)` gives: a model placed as the options ask, and more.

    Weights that must be stored anew to be read one by one (of experts, of pickles) go to a temporary folder, which is
    removed with the last model that reads them.
    """
    folder = tempfile.mkdtemp(prefix="svl-offload-")
    used = False
    try:
        where = copy.copy(options.device_map), copy.copy(options.max_memory)  # transformers writes into them
        model, more = load(device_map=where[0], max_memory=where[1], offload_folder=folder)
        used = bool(os.listdir(folder))
        if used:
            weakref.finalize(_weights_on_disk(model), shutil.rmtree, folder, ignore_errors=True)
    finally:
        if not used:
            shutil.rmtree(folder, ignore_errors=True)
    first = next((place for place in device_map(model).values() if place not in ("cpu", "disk")), None)
    for hook in _hooks(model):
        if first is not None:
            hook.execution_device = first  # accelerate takes any of them
    return model, more


def _weights_on_disk(model: nn.Module) -> Any:
    """What the offloading hooks of a model, and of models made of it, read."""
    hooks = (hook for module in model.modules() for hook in _hooks(module))
    return next(hook.weights_map.dataset for hook in hooks if hook.offload)


# ------------------------------------------------------------------------------------------------ where things are


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module itself."""
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _fetching_hook(module: nn.Module, leaf: str) -> Any | None:
    """The hook that fetches a parameter or buffer of the module itself whenever it is needed; None if it is there."""
    if not getattr(module, leaf).is_meta:
        return None
    return next((hook for hook in _hooks(module) if hook.offload), None)


def is_spread(model: nn.Module) -> bool:
    """Whether the model has hooks that move tensors."""
    return "_hf_hook" in model.__dict__


def device_map(model: nn.Module) -> dict[str, Any]:
    """Where the modules of a model lie, by name, as transformers decided; empty for a model on one device."""
    return model.__dict__.get("hf_device_map", {}) if is_spread(model) else {}


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs and gives its logits."""
    for hook in _hooks(model):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return model.device


def devices_of(model: Any) -> tuple[torch.device, ...]:
    """The devices that a model computes on, that of its inputs first."""
    hooks = (hook for module in model.modules() for hook in _hooks(module))
    places = (hook.execution_device for hook in hooks)
    found = (torch.device(place) for place in places if place is not None)
    return tuple(dict.fromkeys([input_device(model), *(found if is_spread(model) else ())]))


def places_of(model: nn.Module) -> list[str]:
    """The devices of a spread model, for records, with "cpu" and "disk" where weights are that visit them."""
    offloaded = [place for place in device_map(model).values() if place in ("cpu", "disk")]
    return list(dict.fromkeys([*map(str, devices_of(model)), *offloaded]))


def stored_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, fetched if it is offloaded."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    hook = _fetching_hook(module, leaf)
    tensor: Tensor = getattr(module, leaf) if hook is None else hook.weights_map[leaf]
    return tensor.detach()


def is_offloaded(model: nn.Module, name: str) -> bool:
    """Whether a hook fetches the parameter or buffer of this name whenever it is needed."""
    path, _, leaf = name.rpartition(".")
    return _fetching_hook(model.get_submodule(path), leaf) is not None


def tensor_identities(module: nn.Module) -> tuple[Hashable, ...]:
    """What a module computes with, by names: equal for modules that share every tensor, in memory or offloaded."""
    found: list[Hashable] = []
    for path, part in module.named_modules():
        for leaf, t in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            hook = _fetching_hook(part, leaf)
            where: Hashable = (t.device, t.data_ptr(), t.stride())
            if hook is not None:
                where = _fetched_identity(hook.weights_map, leaf)
            found.append((f"{path}.{leaf}", t.shape, where))
    return tuple(found)


def _fetched_identity(weights: Any, leaf: str) -> Hashable:
    """Of a tensor that a hook fetches: where from, or the changed tensor that took its place."""
    if isinstance(weights, ChainMap):
        changed, weights = weights.maps
        if leaf in changed:
            return changed[leaf].data_ptr()
    return id(weights.dataset), f"{weights.prefix}{leaf}"


# ----------------------------------------------------------------------------------------- models made of others


def place_like(
    dense: nn.Module, pruned: nn.Module, names: Mapping[str, str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Let `pruned`, whose tensors have no values yet, compute where `dense` does.

    Args:
        dense: any model; of one without hooks, nothing is to be done.
        pruned: gets hooks of its own, which do what those of `dense` do.
        names: of modules of `dense`, and of entries of its device map -> their names in `pruned`.
        tensors: by names in `pruned`; those of `dense` that are offloaded are on the meta device.

    Returns:
        The `tensors` for `pruned` to hold: where a new one takes the place of an offloaded one, its hook fetches it,
        and it is on the meta device here.
    """
    if not is_spread(dense):
        return tensors
    held = dict(tensors)
    for old, module in dense.named_modules():
        if old not in names or not _hooks(module):
            continue
        new = names[old]
        hooks = [copy.copy(hook) for hook in _hooks(module)]
        names_of = {leaf: f"{new}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)}
        given = {leaf: tensors[name] for leaf, name in names_of.items() if name in tensors}
        for hook in hooks:
            if hook.offload:
                changed = {leaf: t.to("cpu") for leaf, t in given.items() if not t.is_meta}
                hook.weights_map = _with_changes(hook.weights_map, changed)
                for leaf, t in given.items():
                    held[names_of[leaf]] = torch.empty(t.shape, dtype=t.dtype, device="meta")
        _attach(pruned.get_submodule(new), hooks)
    places = device_map(dense).items()
    pruned.__dict__["hf_device_map"] = {names[name]: place for name, place in places if name in names}
    return held


@contextmanager
def changed_tensors(layer: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Within the block, offloaded parameters of `layer` are those of `changed`; gives the rest of `changed`."""
    in_memory, before = {}, []
    try:
        for name, tensor in changed.items():
            path, _, leaf = name.rpartition(".")
            hook = _fetching_hook(layer.get_submodule(path), leaf)
            if hook is None:
                in_memory[name] = tensor
            else:
                before.append((hook, hook.weights_map))
                hook.weights_map = _with_changes(hook.weights_map, {leaf: tensor})
        yield in_memory
    finally:
        for hook, weights in reversed(before):
            hook.weights_map = weights


def _with_changes(weights: Any, changed: dict[str, Tensor]) -> Any:
    """What a hook reads, with some tensors in the place of others."""
    if not changed:
        return weights
    earlier, stored = weights.maps if isinstance(weights, ChainMap) else ({}, weights)
    return ChainMap({**earlier, **changed}, stored)


def _attach(module: nn.Module, hooks: list[Any]) -> None:
    """Let hooks act on a module whose tensors are in place already."""
    from accelerate.hooks import SequentialHook, add_hook_to_module

    for hook in hooks:
        hook.init_hook = lambda module: module  # accelerate's would move them one by one, and empty caches for each
    add_hook_to_module(module, hooks[0] if len(hooks) == 1 else SequentialHook(*hooks))
