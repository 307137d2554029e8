"""A checkpoint's model without its weights, and which tensors on disk make which of its parameters.

Names on disk and in memory differ for many families, in more than one way (older layouts, experts one by one, fused
projections). transformers knows all of it; here it is asked, name by name, instead of being imitated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from svl import checkpoint, loading
from svl.checkpoint import Stored
from svl.core import SvlError
from svl.loading import Anatomy


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk belongs: a parameter (or buffer) of the model, and what it undergoes on the way there."""

    name: str
    converter: Any = None  # transformers' WeightConverter; None: it is taken as it is


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters have shapes but no values.

    Attributes:
        folder: of the checkpoint.
        model: its parameters are on the meta device; buffers that it computes itself are real.
        anatomy: of the model.
        stored: all tensors on disk.
        places: by name on disk; tensors that the model has no use for are missing.
    """

    folder: Path
    model: Any
    anatomy: Anatomy
    stored: dict[str, Stored]
    places: dict[str, Place]

    def layer(self, name: str) -> int | None:
        """The decoder layer that a parameter belongs to, if any."""
        return layer_of(name, self.anatomy.layers)

    def fill(self, keys: Iterable[str], device: torch.device | str = "cpu") -> None:
        """Read the tensors `keys` from disk into the model, in its dtype."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = self.model.dtype
        settings = LoadStateDictConfig(
            device_map={"": torch.device(device)}, dtype=dtype, dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=_transforms(self.model),
        )  # fmt: skip
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            state = {}
            for key in keys:
                file = self.stored[key].file
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, "pt"))
                state[key] = files[file].get_slice(key)
            with _no_progress_bar():
                info, _ = convert_and_load_state_dict_in_model(self.model, state, settings)
        if problems := [*info.mismatched_keys, *info.conversion_errors]:
            raise SvlError(f"'{self.folder}' does not fit its config.json: {problems[0]}")


def layer_of(name: str, layers: str) -> int | None:
    """The number N of a name `<layers>.N.<rest>`, else None."""
    if not name.startswith(f"{layers}."):
        return None
    number = name[len(layers) + 1 :].partition(".")[0]
    return int(number) if number.isdigit() else None


def build(
    folder: Path,
    *,
    dtype: Any = "auto",
    layers: str | None = None,
    image_token: int | None = None,
    protect: str | Sequence[int] = "auto",
    trust_remote_code: bool = False,
    shapes_only: bool = False,
) -> Skeleton:
    """The skeleton of a checkpoint folder; reads headers only. Arguments are those of `loading.load` and `hollow`.

    Raises:
        SvlError: if the checkpoint cannot be read at file level, holds no model with decoder layers, or does not fit
            the model that its config.json describes.
    """
    stored = checkpoint.read(folder)
    config, auto = loading.describe(folder, None, trust_remote_code)
    if dtype == "auto":
        dtype = config.dtype or next(t for s in stored.values() if (t := checkpoint.DTYPES[s.dtype]).is_floating_point)
    model = hollow(auto, config, dtype, trust_remote_code, shapes_only)
    places = match(model, stored)
    anatomy = loading.find_anatomy(model, layers, image_token=image_token, protect=protect)
    skeleton = Skeleton(folder, model, anatomy, stored, places)
    if missing := lacking(model, places):
        raise SvlError(
            f"the layout of '{folder}' is not known: {len(missing)} weights of {type(model).__name__} are not in it, "
            f"{missing[0]} for one"
        )
    return skeleton


def hollow(
    auto: Any, config: Any, dtype: torch.dtype, trust_remote_code: bool = False, shapes_only: bool = False
) -> Any:
    """The model that a config describes, in evaluation mode, its parameters on the meta device.

    With `shapes_only`, so are its buffers, which takes a fraction of the time.
    """
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    with ExitStack() as stack:
        for context in (
            (torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights())
            if shapes_only
            else (_parameters_on_meta(),)
        ):
            stack.enter_context(context)
        model = auto.from_config(config, dtype=dtype, **trust)
    if shapes_only:
        model.tie_weights()  # left out without initialisation
    return model.requires_grad_(False).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the block, modules get parameters without values (buffers, like rotary tables, are computed as ever)."""
    register = nn.Module.register_parameter

    def register_hollow(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_hollow  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _transforms(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def match(model: Any, keys: Iterable[str]) -> dict[str, Place]:
    """Where the model puts tensors of these names, found as transformers finds it on loading."""
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = _transforms(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, base = model.state_dict(), model.base_model_prefix
    places = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings depend on the ones before
        name, pattern = rename_source_key(key, renamings, converters, base, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base, state)
        if name in state:
            places[key] = Place(name, of_pattern.get(pattern) if pattern else None)
    return places


def lacking(model: Any, places: dict[str, Place]) -> Sequence[str]:
    """Parameters and persistent buffers of the model that no tensor on disk makes, sorted."""
    made = set()
    for place in places.values():
        targets = place.converter.target_patterns if place.converter else [""]
        made |= {place.name.replace(targets[0], target) for target in targets}
    optional = "|".join(model._keys_to_ignore_on_load_missing or ()) or r"(?!)"
    tied = model.all_tied_weights_keys
    return sorted(n for n in model.state_dict().keys() - made if n not in tied and not re.search(optional, n))


def local(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: itself, or a hub id's files (safetensors only), downloaded if they are not yet here.

    Raises:
        SvlError: if there is no such folder or id.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Path(path).absolute()
    if path.startswith((".", "/")) or path.count("/") != 1:
        raise SvlError(f"source: '{source}' is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    ignored = [f"*{suffix}" for suffix in (*checkpoint.PICKLES, ".gguf", ".onnx", ".h5", ".msgpack")]
    try:
        return Path(snapshot_download(path, revision=revision, ignore_patterns=[*ignored, "*/*"]))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = type(error).__name__
        raise SvlError(f"source: '{source}' is no local folder, and the hub does not give it ({reason})") from error
