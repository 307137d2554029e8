"""A pruned checkpoint for others: from a plan and a checkpoint on disk to a new one, which needs no svl to load.

(One of a model that transformers does not have, see svl.models.ports, needs svl for its code, and its card says so.)

No model is loaded: tensors that stay are copied as bytes under their new names, what a patch changes is computed one
tensor at a time. The new names and shapes are checked against the model that the new config describes before anything
is written. The result is the checkpoint that removing the layers in memory and `save_pretrained` would give, bit for
bit. It is written to a temporary folder beside its destination and renamed when complete; the source is only read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svl.core.errors import SvlError
from svl.core.patch import Patch
from svl.core.plan import Plan
from svl.models.options import LoadOptions
from svl.store.locks import held

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class ExportRecord:
    """Which run an export comes from.

    Attributes:
        result: its result.json, for the model card.
        key: its key, for config.json.
        image_processor: settings of the image processor that it used instead of the checkpoint's own.
    """

    result: dict[str, Any] | None = None
    key: str | None = None
    image_processor: Mapping[str, Any] = field(default_factory=dict)


def save(
    source: Path | str,
    plan: Plan,
    path: Path | str,
    patch: Patch | None = None,
    options: LoadOptions | None = None,
    *,
    shard_size: int | str = "5GB",
    record: ExportRecord | None = None,
) -> Path:
    """Write the checkpoint that is left of `source` after `plan` (and `patch`) to the new folder `path`.

    The plan is also in `config.json`, under `layer_pruning`, with the projections that were changed (`compensated`,
    as "<original layer>.<writer>"), the `key` of the run, if it is one's, and the history of a model that was pruned
    before.

    Args:
        source: checkpoint folder, or hub id.
        plan: which layers go.
        path: the folder to make.
        patch: what is folded into kept weights; layers are original indices.
        options: how the source is read; its `name` is the dense model's in the card.
        shard_size: largest weights file, in bytes or like "5GB".
        record: of the run that made the plan.

    Raises:
        SvlError: before anything is written, if `path` exists or another process writes it, the source cannot be
            exported at file level (quantised, pickled, incomplete, of unknown layout), plan or patch do not fit it, or
            the disk has too little room.
    """
    from svl.checkpoints import new_checkpoint

    path = _absolute(path)
    options, record = options or LoadOptions(), record or ExportRecord()
    limit = parse_size(shard_size)
    if path.exists():
        raise SvlError(f"export.path '{path}' exists already; it is never overwritten")
    with held(path):
        new = new_checkpoint.plan_checkpoint(source, plan, patch or Patch(), options, record.key)
        check_disk_space(path, new.bytes)
        new.write(path, limit, record)
    return path


def exporting_run(path: Path | str) -> str | None:
    """The key of the run that exported to `path`; None if there is nothing, or something else."""
    try:
        config = json.loads((_absolute(path) / "config.json").read_text(encoding="utf-8"))
        key = config["layer_pruning"]["key"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    except OSError as error:
        raise SvlError(f"cannot read export.path '{path}': {error.strerror or error}") from error
    return key if isinstance(key, str) else None


def check_export_path(path: Path | str) -> None:
    """Raise SvlError if `path` exists and is no checkpoint that a run exported (whose rerun may find it there)."""
    if _absolute(path).exists() and exporting_run(path) is None:
        raise SvlError(f"export.path '{path}' exists already; it is never overwritten")


@contextmanager
def reserve_export(path: Path | str) -> Iterator[None]:
    """Within the block, only this thread can export to `path`: for what comes before, such as calibration.

    Raises:
        SvlError: if `path` exists, or another process is about to write it; says which, on which host, since when.
    """
    with held(_absolute(path)):
        check_export_path(path)
        yield


def check_exportable(
    source: Path | str,
    path: Path | str,
    options: LoadOptions | None = None,
    *,
    n_remove: int = 0,
    compensates: bool = False,
) -> None:
    """Check all that `save` would refuse, as far as it can be known before there is a plan. Reads headers only.

    Args:
        source: checkpoint folder, or hub id (which is downloaded).
        path: where to export to.
        options: how the source is read.
        n_remove: how many layers will go, to know how much room the export needs at least.
        compensates: whether a patch will change weights.

    Raises:
        SvlError: on the first thing that `save` would refuse.
    """
    from svl.checkpoints import new_checkpoint

    check_export_path(path)
    least = new_checkpoint.check_source(source, options or LoadOptions(), n_remove, compensates)
    if not _absolute(path).exists():  # else the run that has exported it is run again
        check_disk_space(_absolute(path), least)


def parse_size(size: int | str) -> int:
    """A size like 5GB, 500MB or a number of bytes.

    Raises:
        SvlError: if it is none.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B|)", str(size).strip().upper())
    number = int(float(found[1]) * UNITS["" if found[2] == "B" else found[2]]) if found else 0
    if not number:
        raise SvlError(f"shard_size is '{size}', but must be a size like 5GB or 500MB")
    return number


def check_disk_space(path: Path, needed: int) -> None:
    """Raise SvlError unless the disk of a folder to be made has `needed` bytes free."""
    place = next(parent for parent in path.parents if parent.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        import humanize  # not above: the API works where little is installed

        raise SvlError(
            f"the export needs {humanize.naturalsize(needed)}, but {place} has {humanize.naturalsize(free)} left; "
            "nothing was written"
        )


def _absolute(path: Path | str) -> Path:
    return Path(path).expanduser().absolute()
