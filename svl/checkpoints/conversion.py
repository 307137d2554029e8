"""A checkpoint of pickles as one of safetensors files, which export and vLLM need; `svl-export convert`.

No code in the pickles runs. One file is read at a time (mapped into memory where its format allows), and becomes one
file of the same tensors. The folder appears whole or not at all; its config.json says under `converted_from` what it
was made of.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from svl.checkpoints import hub
from svl.checkpoints.auxiliary_files import copy_auxiliary_files, find_auxiliary_files
from svl.checkpoints.export import check_disk_space
from svl.checkpoints.fingerprint import checkpoint_fingerprint
from svl.checkpoints.pruning_record import CONVERTED
from svl.checkpoints.safetensors_files import read_header
from svl.core.errors import SvlError, explained
from svl.models.weight_files import INDEX, WEIGHTS, find_weight_files, read_json
from svl.store.files import whole_folder

log = logging.getLogger(__name__)


def convert(source: Path | str, path: Path | str, revision: str | None = None) -> Path:
    """Write the pickled checkpoint `source` (a folder or hub id) to the new folder `path` as safetensors files.

    Raises:
        SvlError: if the source has no pickles, one holds anything but named tensors, tensors are missing or occur
            twice, or `path` exists or cannot be written.
    """
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise SvlError(f"out: '{path}' exists already; it is never overwritten")
    folder = hub.local_checkpoint(source, revision, pickles=True)
    weights = find_weight_files(folder)
    if not weights.pickled:
        raise SvlError(f"source: the weights of '{source}' are no pickles ({weights.files[0].name}): use it as it is")
    config, files = read_json(folder / "config.json"), find_auxiliary_files(folder)
    origin = {"source": str(source), "fingerprint": checkpoint_fingerprint(str(folder), None, path, full_hash=True)}
    if base_model := hub.hub_id(source):
        origin["base_model"] = base_model
    check_disk_space(path, sum(file.stat().st_size for file in (*weights.files, *files)))
    with whole_folder(path) as target:
        weight_map = _write_tensors(weights.files, target)
        if weights.names is not None and (missing := weights.names - weight_map.keys()):
            raise SvlError(f"'{folder}' lacks tensor '{min(missing)}', which its index names")
        if len(weights.files) > 1:
            size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_auxiliary_files(folder, files, target)
        (target / "config.json").write_text(json.dumps({**config, CONVERTED: origin}, indent=2) + "\n")
    return path


def _write_tensors(files: Sequence[Path], target: Path) -> dict[str, str]:
    """Write every pickle as a safetensors file in the folder `target`; tensor -> file."""
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = read_pickle(file)
        if twice := weight_map.keys() & tensors.keys():
            raise SvlError(f"tensor '{min(twice)}' is in '{file.name}' and in another file before it")
        save_file(tensors, target / name, {"format": "pt"})
        if read_header(target / name).keys() != tensors.keys():
            raise RuntimeError(f"'{target / name}' does not hold what was written to it")
        weight_map |= dict.fromkeys(tensors, name)
        log.info("  %s -> %s: %d tensors", file.name, name, len(tensors))
    return weight_map


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The named tensors of a file that torch.save wrote, each with memory of its own; runs none of its code.

    Raises:
        SvlError: if it cannot be read so, or holds anything else.
    """
    with explained(f"cannot read '{file}' without running code that is in it"):
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise SvlError(f"'{file}' holds other things than tensors by name, so it is no model's weights")
    tensors, seen = {}, set()
    for name, tensor in loaded.items():
        tensor = tensor.detach()
        memory = tensor.untyped_storage().data_ptr()
        tensors[str(name)] = tensor.clone().contiguous() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return tensors
