"""The files beside the weights that a pruned checkpoint takes along: tokenizer, processor, templates, licence, code."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from svl.core.errors import SvlError
from svl.models.weight_files import PICKLES, is_inside

KNOWN = (
    "*tokenizer*.json",
    "*processor*.json",
    "generation_config.json",
    "chat_template*",
    "*.jinja",
    "*.tiktoken",
    "*.model",
    "*.spm",
    "*vocab*",
    "*merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "encoder.json",
    "*.py",  # code that config.json may name; it runs only with trust_remote_code
    "licen[cs]e*",
    "notice*",
    "copying*",
    "use_policy*",
)
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".onnx", ".msgpack")
TEMPLATES = "additional_chat_templates"


def find_auxiliary_files(folder: Path) -> list[Path]:
    """The known files of a checkpoint folder, sorted; hidden and unknown ones are none.

    Raises:
        SvlError: if one is a link to a file outside the folder (or the hub cache that it is in).
    """
    candidates = [path for path in folder.iterdir() if _is_known(path.name)]
    candidates += (folder / TEMPLATES).glob("[!.]*.jinja")
    found = [path for path in sorted(candidates) if path.is_file()]
    for path in found:
        if not is_inside(folder, path):
            raise SvlError(
                f"'{path}' is a link out of its folder, to '{path.resolve()}', which would become part of the "
                "export: copy the file there, or remove the link"
            )
    return found


def _is_known(name: str) -> bool:
    lower = name.lower()
    return any(fnmatch(lower, known) for known in KNOWN) and not lower.startswith(".") and not lower.endswith(WEIGHTS)


def copy_auxiliary_files(source: Path, files: list[Path], target: Path) -> None:
    """Copy files of the folder `source` to where they belong in the folder `target`."""
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
