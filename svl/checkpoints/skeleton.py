"""A checkpoint's model without its weights, and which tensors on disk make which of its parameters.

Names on disk and in memory differ for many families, in more than one way (older layouts, experts one by one, fused
projections). transformers knows all of it; here it is asked, name by name, instead of being imitated.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn

from svl.checkpoints.safetensors_files import DTYPES, StoredTensor, read_tensors
from svl.core.errors import SvlError
from svl.models.anatomy import Anatomy, find_anatomy
from svl.models.loading import read_model_config
from svl.models.options import LoadOptions
from svl.models.size_checks import described_model
from svl.models.transformers_internals import (
    Destination,
    fill_model,
    match_names,
    missing_parameters,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters have shapes but no values.

    Attributes:
        folder: of the checkpoint.
        model: its parameters are on the meta device; buffers that it computes itself are real.
        auto: the transformers class (AutoModelFor...) that loads it.
        anatomy: of the model.
        stored: all tensors on disk.
        places: by name on disk; tensors that the model has no use for are missing.
    """

    folder: Path
    model: PreTrainedModel
    auto: Any
    anatomy: Anatomy
    stored: dict[str, StoredTensor]
    places: dict[str, Destination]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return cast(nn.ModuleList, self.model.get_submodule(self.anatomy.layers))

    def layer(self, name: str) -> int | None:
        """The decoder layer that a parameter belongs to, if any."""
        return self.anatomy.layer_number(name)

    def fill(self, keys: Iterable[str], device: torch.device | str = "cpu") -> None:
        """Read the tensors `keys` from disk into the model, in its dtype.

        Raises:
            SvlError: if they do not fit.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            slices = {}
            for key in keys:
                file = self.stored[key].file
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, "pt"))
                slices[key] = files[file].get_slice(key)
            problems = fill_model(self.model, slices, device)
        if problems:
            raise SvlError(f"'{self.folder}' does not fit its config.json: {problems[0]}")


def read_skeleton(
    folder: Path, options: LoadOptions | None = None, *, image_token: int | None = None, shapes_only: bool = False
) -> Skeleton:
    """The skeleton of a checkpoint folder; reads headers only.

    Args:
        folder: of the checkpoint.
        options: how it is read; `device`, `revision` and `image_token` play no part.
        image_token: id of the image placeholder, where the config does not tell.
        shapes_only: leave the model's buffers without values, too, which takes a fraction of the time.

    Raises:
        SvlError: if the checkpoint cannot be read at file level, holds no model with decoder layers, or does not fit
            the model that its config.json describes.
    """
    options = replace(options or LoadOptions(), revision=None)
    stored = read_tensors(folder)
    config, auto = read_model_config(folder, options)
    dtype = loaded_dtype(config, stored.values(), options)
    model = described_model(auto, config, folder, dtype, options, shapes_only=shapes_only)
    places = match_names(model, stored)
    found = find_anatomy(model, options.layers, image_token=image_token, protect=options.protect)
    if missing := missing_parameters(model, places):
        raise SvlError(
            f"the layout of '{folder}' is not known: {len(missing)} weights of {type(model).__name__} are not in it, "
            f"{missing[0]} for one"
        )
    skeleton = Skeleton(folder, model, auto, found, stored, places)
    _check_kinds(skeleton)
    return skeleton


def loaded_dtype(config: PreTrainedConfig, stored: Iterable[StoredTensor], options: LoadOptions) -> torch.dtype:
    """The dtype of the model, as transformers chooses it: what the options ask for, else what the config or the first
    tensor of real numbers has; float32 without any. `stored` is read only where it decides.
    """
    if isinstance(options.torch_dtype, torch.dtype):
        return options.torch_dtype
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((DTYPES[s.dtype] for s in stored if DTYPES[s.dtype].is_floating_point), torch.float32)


def _check_kinds(skeleton: Skeleton) -> None:
    """Raise SvlError if a parameter of real numbers is stored as integers or complex numbers, or the other way."""
    state = skeleton.model.state_dict()
    for key, place in skeleton.places.items():
        if DTYPES[skeleton.stored[key].dtype].is_floating_point != state[place.name].is_floating_point():
            raise SvlError(
                f"the layout of '{skeleton.folder}' is not known: '{key}' is stored as {skeleton.stored[key].dtype}, "
                f"but {place.name} is {state[place.name].dtype}".replace("torch.", "")
            )
