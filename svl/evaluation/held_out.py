"""What benchmarks are scored on, which nothing may be calibrated or trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import SvlError
from svl.data.data_folder import BUILDERS, find_data_files
from svl.evaluation.benchmarks import LOADERS, OWN, find_task, task_data_files, task_files, task_settings
from svl.evaluation.settings import TaskOptions
from svl.store.files import file_digest

if TYPE_CHECKING:
    from svl.data.hub_data import HubSource

ROWS = {ending for endings in BUILDERS.values() for ending in endings}  # of files that rows are read from


def check_not_evaluated_on(
    path: str, drawn: HubSource | None, tasks: Mapping[str, TaskOptions], group: str = "calibration"
) -> None:
    """Raise SvlError if the data of `group` (of settings) are what a benchmark is scored on.

    Data sets are compared by name and split with those of the chosen `tasks` and of every task of svl
    ("lmms-lab/ScienceQA" and a folder "ScienceQA" are the same); every file that is read, also those inside a folder,
    by content with the local files of the chosen tasks.

    Args:
        path: a file, a folder or a hub id.
        drawn: how a split of a data set is drawn; None for a file, or a folder that is read whole.
        tasks: the chosen ones.
        group: for messages.
    """
    _check_names(path, drawn, tasks, group)
    read = [file for file in _files_read(Path(path).expanduser(), drawn, group) if file.stat().st_size]
    for task, options in tasks.items():
        by_size: dict[int, list[Path]] = {}
        for file in _scored_files(task, options) if read else ():
            by_size.setdefault(file.stat().st_size, []).append(file)
        for file in read:
            if any(file_digest(file) == file_digest(other) for other in by_size.get(file.stat().st_size, ())):
                raise SvlError(f"{group}.path: '{file}' is what benchmark task '{task}' is scored on")


def _check_names(path: str, drawn: HubSource | None, tasks: Mapping[str, TaskOptions], group: str) -> None:
    name, splits = _name_of_data_set(Path(path).expanduser()), _splits_read(Path(path).expanduser(), drawn)
    own = {task: None for task in task_files(OWN) if task not in tasks}
    for task, include_path in {**{task: options.include_path for task, options in tasks.items()}, **own}.items():
        config = task_settings(task, include_path)
        theirs = config.get("dataset_path") or ""
        if theirs in LOADERS or name != _plain(theirs.rpartition("/")[2]):
            continue
        if splits is not None and _usual(_scored_split(config)) not in splits:
            continue
        what, instead = f"{group}.path: '{path}'", f"set {group}.format and {group}.split to read another split"
        if drawn:
            what = f"{group}.split: '{drawn.split}' of {Path(path).name}"
            instead = f"{'calibrate' if group == 'calibration' else 'train'} on another split"
        verb = "is" if splits and len(splits) == 1 else "holds"
        raise SvlError(f"{what} {verb} what benchmark task '{task}' is scored on; {instead}")


def _name_of_data_set(place: Path) -> str:
    """What the data set is called: by its hub id, its folder, `data` within that, or a file in either."""
    if place.exists():
        place = place.absolute()
        place = place.parent if place.is_file() else place
        place = place.parent if place.name == "data" else place
    return _plain(place.name)


def _splits_read(place: Path, drawn: HubSource | None) -> set[str] | None:
    """The splits of a data set that are read, as far as names tell; None for all of them."""
    if drawn:
        parts = {_usual(re.split(r"[\[(]", part)[0].strip()) for part in drawn.split.split("+")}
        return None if "all" in parts else parts
    return set(map(_usual, re.split("[^a-z]+", place.name.lower()))) if place.is_file() else None


def _files_read(place: Path, drawn: HubSource | None, group: str) -> Iterable[Path]:
    """The files with rows that are read; none of a data set of the hub."""
    if not place.is_dir():
        return [place] if place.is_file() else []
    if drawn is None:
        found: Iterable[Path] = (file for file in place.rglob("*") if file.is_file())
    else:
        by_split = find_data_files(place.absolute(), drawn.name, f"{group}.path")[1]
        splits = _splits_read(place, drawn)
        names = [split for split in by_split if splits is None or _usual(split) in splits]
        found = (Path(file) for split in names for file in by_split[split])
    return [file for file in found if ROWS.intersection(file.suffixes)]


def _scored_files(task: str, options: TaskOptions) -> Iterator[Path]:
    """The local files that a task is scored on; of files by split, those of its own."""
    config = task_settings(task, options.include_path)
    given: dict[str, Any] = config.get("dataset_kwargs") or {}
    files, split = given.get("data_files"), _scored_split(config)
    if isinstance(files, dict) and split in files:
        config = {**config, "dataset_kwargs": {**given, "data_files": files[split]}}
    return task_data_files(find_task(task, options.include_path), config)


def _scored_split(config: Mapping[str, Any]) -> str:
    return str(config.get("test_split") or config.get("validation_split") or "")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _usual(split: str) -> str:
    return "validation" if split in ("val", "dev") else split
