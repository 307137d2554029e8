"""Whether a config describes a model of the size of its weights: one that does not would fill memory for nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svl.core.errors import SvlError, explained
from svl.models.anatomy import DEPTH_FIELDS
from svl.models.hub_snapshot import find_hub_snapshot
from svl.models.options import LoadOptions
from svl.models.weight_files import find_weight_files, stored_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

COUNT = re.compile(r"(^|_)(layers?|depths?|blocks|labels)$")  # config fields that count what lists are made of
PARAMETERS_PER_BYTE = 4  # at most, in any format
WEIGHTS_PER_TENSOR = 8  # at most: a stored tensor may be several in the model
MOST_LAYERS = 10_000  # that a config may ask for where the number of stored tensors is not known
MOST = 100_000  # of anything else that is counted


def check_counts(fields: dict[str, Any], path: str | Path) -> None:
    """Raise SvlError if a config, in any of its parts, asks for more layers than there are tensors.

    To be called before transformers makes lists as long as that.
    """
    _check_counts(fields, len(stored_names(path)), path)


def _check_counts(fields: dict[str, Any], n_stored: int, path: str | Path) -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            _check_counts(value, n_stored, path)
            continue
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        largest = max(numbers, default=0)
        where = f"cannot load a model from '{path}': its config says {name}={largest}, but"
        if name in DEPTH_FIELDS and largest > (n_stored or MOST_LAYERS):
            have = f"the checkpoint has {n_stored} tensors" if n_stored else f"no model has more than {MOST_LAYERS}"
            raise SvlError(f"{where} {have}")
        if COUNT.search(name) and largest > MOST:
            raise SvlError(f"{where} no model has more than {MOST}")


def described_model(
    auto: Any,
    config: PreTrainedConfig,
    path: str | Path,
    dtype: torch.dtype,
    options: LoadOptions,
    *,
    shapes_only: bool = True,
) -> PreTrainedModel:
    """The model that a config describes, without values (see transformers_internals.empty_model).

    Raises:
        SvlError: if transformers cannot make it, or it has far more weights than are stored at `path`.
    """
    from svl.models.transformers_internals import empty_model

    most = WEIGHTS_PER_TENSOR * len(stored_names(path)) or MOST
    with explained(f"cannot load a model from '{path}'"):
        attention = None if options.attn_implementation == "auto" else options.attn_implementation
        return empty_model(auto, config, dtype, options.trust_remote_code, shapes_only, most, attention)


def check_size(path: str, config: PreTrainedConfig, auto: Any, options: LoadOptions) -> None:
    """Raise SvlError if a config describes a model far larger than its weights, which would only fill memory.

    Custom code is not tried: it may not work without values.
    """
    stored = stored_bytes(path, options.revision)
    if options.trust_remote_code or stored is None:
        return
    model = described_model(auto, config, path, torch.bfloat16, options, shapes_only=True)
    n_parameters = sum(p.numel() for p in model.parameters())
    if n_parameters > PARAMETERS_PER_BYTE * stored:
        raise SvlError(
            f"cannot load a model from '{path}': its config describes {n_parameters:,} parameters, but its weights "
            f"have {stored:,} bytes"
        )


def stored_bytes(path: str, revision: str | None) -> int | None:
    """Size of the weights of a folder or hub id; None where the hub does not tell.

    Raises:
        SvlError: if there are none, or an adapter would be added to them.
    """
    if os.path.isdir(path):
        return sum(file.stat().st_size for file in find_weight_files(Path(path)).files)
    return find_hub_snapshot(path, revision).weight_bytes
