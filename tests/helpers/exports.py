"""svl-export as its users run it, and checkpoints that are changed by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.commands import run_command
from safetensors.torch import load_file, save_file
from torch import Tensor

from svl.checkpoints import export_command
from svl.models.weight_files import WEIGHTS


def svl_export(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> str:
    """`svl-export` to its end, in this process; what it printed, on stdout, or on stderr if it is to fail."""
    finished = run_command(export_command.main, *arguments, cwd=cwd, code=code, **environment)
    return finished.stderr if code else finished.stdout


def write_plan(folder: Path, **fields: Any) -> None:
    """A plan by hand, for a model of 4 layers."""
    (folder / "plan.json").write_text(json.dumps({"n_layers": 4, "removed": [0, 2], **fields}))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    """Replace the tensors of a checkpoint of one file: `change` gives others, or changes them in place."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS, {"format": "pt"})


def set_config(folder: Path, **fields: Any) -> None:
    """Set fields of a checkpoint's config.json."""
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **fields}))


def as_hub_cache(folder: Path, cache: Path) -> Path:
    """A checkpoint as the hub's cache has it (files are links into blobs); its snapshot folder."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot
