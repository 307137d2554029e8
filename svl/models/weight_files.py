"""Which files of a checkpoint folder hold the weights that are loaded: transformers' choice, made and checked once.

Loading, fingerprints and export all go by this, so that what is analysed is what is hashed and what is exported.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from svl.core.errors import SvlError, explained

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
STANDARD_NAMES = [WEIGHTS, INDEX, PICKLED, PICKLED_INDEX]  # transformers takes the first that is there
NAMED = (".safetensors", ".safetensors.index.json")  # what the config may name
ADAPTER = "adapter_config.json"
CONVERT = "convert them once, with 'svl-export convert source={} out=DIR', and use that folder"

LONGEST_HEADER = 16 * 2**20  # bytes of a safetensors header: more than 100,000 tensors
LONGEST_JSON = 64 * 2**20  # bytes


FilesState = tuple[tuple[str, int, int, int, int], ...]  # path, size, time of change, inode, time of any change


def state_of_files(path: str | Path) -> FilesState:
    """What tells whether any file in a checkpoint folder is still the one it was; nothing for a hub id.

    The same files, and the same by which a fingerprint trusts a hash that it remembers.

    Raises:
        SvlError: if one cannot be looked at.
    """
    folder = Path(path)
    try:
        stats = [(file, file.stat()) for file in (folder / name for name in checkpoint_files(folder))]
    except OSError as error:
        raise SvlError(f"model.path: cannot read '{path}': {error}") from error
    return tuple((str(f.absolute()), s.st_size, s.st_mtime_ns, s.st_ino, s.st_ctime_ns) for f, s in stats)


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files that count, in folders, too: not texts about the model, and nothing hidden (locks, caches)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() != ".md")
    names = [file.relative_to(folder).as_posix() for file in files]
    return [name for name in names if not name.startswith(".") and "/." not in name]


@dataclass(frozen=True)
class WeightFiles:
    """The files that a checkpoint's weights are read from.

    Attributes:
        files: their paths, sorted.
        names: of the tensors that an index lists; None without an index.
        pickled: whether they are pickles, which may run code, and not safetensors files.
    """

    files: tuple[Path, ...]
    names: frozenset[str] | None = None
    pickled: bool = False


def find_weight_files(folder: Path) -> WeightFiles:
    """The weights of a checkpoint folder, in transformers' order of preference.

    That is the file or index that the config names as `transformers_weights`; model.safetensors; its index; the same
    two as pickles.

    Raises:
        SvlError: if there are none, an index is damaged or names files that are not there, files lie outside the
            folder (the blobs of the hub's cache count as inside), or an adapter would be added to them.
    """
    check_no_adapter(folder, os.listdir(folder))
    name = _chosen_name(folder)
    if name is None:
        raise SvlError(_why_no_weights(folder))
    where = "name" if name in STANDARD_NAMES else "config"
    if where == "config" and not name.endswith(NAMED):
        raise SvlError(
            f"'{folder}' takes weights from {name!r}, which its config names: only *{' or *'.join(NAMED)} can be"
        )
    pickled = name in (PICKLED, PICKLED_INDEX)
    if not name.endswith(".index.json"):
        return WeightFiles((_checked(folder, name, where),), pickled=pickled)
    weight_map = _read_weight_map(folder / name)
    files = [_checked(folder, file, "index") for file in sorted(set(weight_map.values()))]
    return WeightFiles(tuple(files), frozenset(weight_map), pickled)


def has_weight_files(folder: Path) -> bool:
    """Whether a checkpoint folder has weights at all, be they sound or not."""
    return _chosen_name(folder) is not None


def stored_names(path: Path | str) -> set[str]:
    """Names of the tensors in the safetensors files of a folder; empty for a hub id, without weights, and for pickles.

    Raises:
        SvlError: if the folder takes its weights from elsewhere or has an adapter, or its file cannot be read.
    """
    folder = Path(path)
    if folder.is_dir():
        check_no_adapter(folder, os.listdir(folder))  # before anything that an adapter's folder lacks
    found = find_weight_files(folder) if folder.is_dir() and has_weight_files(folder) else None
    if found is None or found.pickled:
        return set()
    if found.names is not None:
        return set(found.names)
    from safetensors import safe_open

    with explained(f"cannot load a model from '{path}'"), safe_open(found.files[0], "pt") as tensors:
        return set(tensors.keys())


def _chosen_name(folder: Path) -> str | None:
    """The file or index that transformers reads, in its order of preference; None if there is none."""
    named = read_json(folder / "config.json").get("transformers_weights")
    names = [named] if isinstance(named, str) else STANDARD_NAMES
    return next((name for name in names if (folder / name).is_file()), None)


def check_index(folder: Path) -> None:
    """Raise SvlError if transformers cannot read the index of a checkpoint folder, because it has no `metadata`."""
    name = _chosen_name(folder) or ""
    if name.endswith(".index.json") and not isinstance(read_json(folder / name).get("metadata"), dict):
        raise SvlError(f'\'{folder / name}\' has no "metadata", which transformers asks for: add "metadata": {{}}')


def check_no_adapter(source: Path | str, names: Collection[str]) -> None:
    """Raise SvlError if, with files of these names, transformers would load other weights than the checkpoint has."""
    if ADAPTER in names:
        raise SvlError(
            f"'{source}' has a PEFT adapter ({ADAPTER}), which is added to the weights on loading, but is no part of "
            "them: merge it first (peft: model.merge_and_unload().save_pretrained(...)), or remove the adapter's files"
        )


def _read_weight_map(index: Path) -> dict[str, str]:
    """Names of tensors -> names of files, as an index has them."""
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise SvlError(f"'{index}' has no map of weights to files")
    return weight_map


def _checked(folder: Path, name: str, where: str) -> Path:
    """The path of a weights file that the folder's index (or config) names.

    Raises:
        SvlError: if it is not there, lies outside the folder, is hidden (so that its content is not hashed), or starts
            with a header that is longer than any model's.
    """
    path, parts = folder / name, PurePosixPath(name).parts
    try:
        is_own = is_inside(folder, path) and not any(part.startswith((".", "/")) for part in parts)
        is_there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # no name of a file, or a link to itself
        is_own, is_there = True, False
    if not is_own:
        raise SvlError(
            f"'{folder}' takes weights from '{name}', which its {where} names and which lies outside the folder or is "
            "hidden: a checkpoint's weights must be visible files of its own; copy them there"
        )
    if not is_there:
        raise SvlError(f"'{folder}' lacks {name!r}, which its {where} names")
    if path.suffix == ".safetensors":
        check_header_length(path)
    return path


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a path, links followed, lies in a checkpoint folder, or in the blobs of the hub's cache that it is in."""
    root, target = folder.resolve(), path.resolve()
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
    return in_cache or target.is_relative_to(root)


def check_header_length(file: Path) -> int:
    """The length in bytes of a safetensors header.

    Raises:
        SvlError: if the file is shorter, or no model has one of that length.
    """
    try:
        with open(file, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
    except (OSError, struct.error) as error:
        raise SvlError(f"'{file}' is damaged or incomplete: {error}") from error
    if length + 8 > file.stat().st_size:
        raise SvlError(f"'{file}' is damaged or incomplete: its header is longer than the file")
    if length > LONGEST_HEADER:
        raise SvlError(
            f"'{file}' is no model's: its list of tensors has {length / 2**20:.0f} MB (at most "
            f"{LONGEST_HEADER / 2**20:.0f} are read)"
        )
    return length


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SvlError: if the file is missing, or holds anything else.
    """
    try:
        if file.stat().st_size > LONGEST_JSON:
            raise ValueError(f"it is longer than {LONGEST_JSON // 2**20} MB")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SvlError(f"'{file.parent}' has no {file.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SvlError(f"cannot read '{file}': {error}") from error
    if not isinstance(content, dict):
        raise SvlError(f"'{file}' holds no JSON object")
    return content


def _why_no_weights(folder: Path) -> str:
    """A message about a folder whose weights are not where they are looked for."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"the weights in '{folder}' are pickles ({pickles[0]}) under a name that is not known"
    if quantised := [name for name in names if name.endswith(".gguf")]:
        return f"the weights in '{folder}' are quantised ({quantised[0]}); name the model they were made from"
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"the layout of '{folder}' is not known: it has {others[0]}, but neither {WEIGHTS} nor {INDEX}"
    return f"'{folder}' has no weights: neither {WEIGHTS} nor {INDEX}"
