"""The files of a data-set folder: a copy of a data set of the hub, or one made like it.

`datasets` would read the folder's README itself, and fetch whatever addresses its `configs` name. Here they are read as
patterns of files inside the folder, and nothing else counts.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from svl.core import SvlError, one_of
from svl.core.errors import explained
from svl.data.card_metadata import read_metadata

# by the name of its builder in `datasets`: endings of files that rows are read from
BUILDERS = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".json"),
    "csv": (".csv",),
    "arrow": (".arrow",),
    "text": (".txt",),
}
PICTURE_ROWS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # columns of pictures; the first counts
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")  # which are not read: they are named, not passed over


def find_data_files(
    folder: Path, name: str | None, setting: str = "calibration.path"
) -> tuple[str, dict[str, list[str]]]:
    """The builder of `datasets` that reads a folder, and the files of its configuration `name`, by split.

    Without `configs` in its README, a configuration is a folder inside, and splits are told by names of files.
    Messages are about `setting`.

    Raises:
        SvlError: if the README cannot be read or names files outside the folder, or no file is found.
    """
    with explained(f"{setting}: the card of the data set in '{folder}' cannot be read"):
        config = _read_config(folder, name)
        if config is None:
            files = _by_name(_matching(folder, f"{name or '.'}/**"), folder)
        elif asked := config.get("data_files"):
            patterns = _by_split(asked)
            files = {split: [file for p in patterns[split] for file in _matching(folder, p)] for split in patterns}
        else:
            files = _by_name(_matching(folder, f"{config.get('data_dir') or '.'}/**"), folder)
    if any(file.name in PICTURE_ROWS for found in files.values() for file in found):
        return "imagefolder", {split: [str(file) for file in found] for split, found in files.items()}
    for builder, endings in BUILDERS.items():
        rows = {split: [str(f) for f in found if set(endings) & set(f.suffixes)] for split, found in files.items()}
        if any(rows.values()):
            return builder, {split: found for split, found in rows.items() if found}
    check_no_archives([file for found in files.values() for file in found], folder, setting)
    raise SvlError(f"{setting}: no file with rows of '{name or 'a data set'}' in the folder '{folder}'")


def check_no_archives(files: Iterable[Path], folder: Path, setting: str) -> None:
    """Raise SvlError if files of a folder are archives, such as the shards of a WebDataset."""
    found = [file for file in files if set(ARCHIVES) & {suffix.lower() for suffix in file.suffixes}]
    if found:
        what = "a WebDataset, " if ".tar" in found[0].suffixes else ""
        raise SvlError(
            f"{setting}: '{folder}' has {what}{len(found)} archives, which are not read, '{found[0].name}' for one: "
            "unpack them, or write their rows as parquet (datasets: load_dataset(...).to_parquet(...))"
        )


def _read_config(folder: Path, name: str | None) -> dict[str, Any] | None:
    """The configuration of that name (the default one if None) in the README; None if it has none at all."""
    entries: list[dict[str, Any]] = read_metadata(folder / "README.md").get("configs") or []
    configs = {str(entry["config_name"]): entry for entry in entries}
    if not configs:
        return None
    if name is None:
        preferred = [key for key, config in configs.items() if config.get("default")] or ["default"]
        name = next(iter(configs)) if len(configs) == 1 else preferred[0]
    one_of("calibration.name", name, list(configs))
    return configs[name]


def _by_split(asked: Any) -> dict[str, list[str]]:
    """`data_files` of a README (a pattern, patterns, or some of each split) as patterns by split."""
    if isinstance(asked, str):
        return {"train": [asked]}
    if not any(isinstance(entry, dict) for entry in asked):
        return {"train": [str(entry) for entry in asked]}
    paths = {str(entry["split"]): entry["path"] for entry in asked}
    return {split: [path] if isinstance(path, str) else list(path) for split, path in paths.items()}


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder that fit a pattern; hidden ones do not."""
    if "://" in pattern or "::" in pattern or PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
        raise SvlError(f"the README of '{folder}' names '{pattern}', which is not inside the folder")
    found = (folder / match for match in glob.glob(pattern, root_dir=folder, recursive=True))
    return sorted(file for file in found if file.is_file() and file.name != "README.md")


def _by_name(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Files by the split that their names, or those of their folders, say; all are `train` if none says one."""
    found: dict[str, list[Path]] = {}
    shards = [re.match(r"(\w+)-\d{5}-of-\d{5}\.", file.name) for file in files]
    if files and all(shards):  # as `datasets` writes them: any word is a split
        for file, shard in zip(files, shards, strict=True):
            found.setdefault(shard[1] if shard else "", []).append(file)
        return found
    for file in files:
        for part in reversed(file.relative_to(folder).parts):
            words = set(re.split("[^a-z]+", part.lower()))
            if split := next((split for split, names in SPLITS.items() if words & names), None):
                found.setdefault(split, []).append(file)
                break
    return found or {"train": files}
