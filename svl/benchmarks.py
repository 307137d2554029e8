"""Where a benchmark is and what it consists of, without importing torch or lmms-eval.

A benchmark is an lmms-eval task: a YAML file, in a folder of one's own (`include_path`), in `svl/tasks`, or among the
tasks that lmms-eval ships; the first place that has the name counts. Task names are found by reading the files' text
(0.15 s for the 1,900 of lmms-eval; its own index parses them, in 6 s).

Files of one's own and those of `svl/tasks` may say more than lmms-eval understands (svl.evaluate acts on it):

    upstream: NAME     a task of lmms-eval, which this file changes; all that it does not say is as there. If it has
                       `process_results` of its own, the other's metrics stay, as `upstream_<name>`.
    together: FUNCTION documents of equal value (by row) are scored as one: a limit takes all of them or none.
    strata: COLUMN     the metric is a sum over the values of this column: for standard errors.
    images: {name: CONFIGURATION, key: COLUMN}  where the same data set keeps the images, by id.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from svl.core import SvlError, did_you_mean, one_of
from svl.store import digest, file_digest, remembered

OWN = Path(__file__).parent / "tasks"
UPSTREAM = "upstream_"  # before the names of lmms-eval's metrics, where a task has its own beside
LARGE = 64 * 2**20  # bytes from which on a data file counts by its size and its ends
_NAME = re.compile(r"""^task:[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """YAML that leaves `!function module.name` a string instead of importing it."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def tasks(folder: Path) -> dict[str, Path]:
    """The YAML file of every task below `folder`."""
    return {name: path for path in sorted(folder.rglob("*.yaml")) for name in _names(path)}


@remembered
def _names(path: Path) -> list[str]:
    return _NAME.findall(path.read_text("utf-8"))


@remembered
def _parsed(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text("utf-8"), _Loader) or {}


def find(task: str, include_path: str | None) -> Path:
    """The YAML file of `task`.

    Raises:
        SvlError: if there is none, naming the closest task there is, if `include_path` is no folder, or if lmms-eval
            is looked for and not installed.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise SvlError(f"benchmark folder '{include_path}' does not exist")
    known = tasks(Path(include_path)) if include_path is not None else {}
    for more in (lambda: tasks(OWN), _shipped_tasks):
        if task not in known:
            known = more() | known
    if task in known:
        return known[task]
    where = f"'{include_path}' or lmms-eval" if include_path is not None else "lmms-eval"
    raise SvlError(f"no benchmark task '{task}' in {where}{did_you_mean(task, known)}")


def fingerprint(task: str, include_path: str | None, data: str | None = None) -> str:
    """16 hex digits that change when the benchmark does.

    They cover the task's YAML with what it includes and changes, the Python files beside those, the content of data
    files on this machine (of those above 64 MiB: size, first and last MiB), and for a task of lmms-eval its version.
    Data on the hub count by name and revision only.

    Raises:
        SvlError: if there is no such task, or no copy of its data in the folder `data`.
    """
    files = sorted(set(_files(find(task, include_path))))
    foreign = any(_shipped() in path.parents for path in files) if importlib.util.find_spec("lmms_eval") else False
    version = importlib.metadata.version("lmms_eval") if foreign else None
    parts = [task, version, [[path.name, _content(path)] for path in files]]
    if data is not None and (copy := local_data(settings(task, include_path), data)):
        parts.append([[str(p.relative_to(copy)), _content(p)] for p in sorted(copy.rglob("*")) if p.is_file()])
    return digest(parts)


def settings(task: str, include_path: str | None) -> dict[str, Any]:
    """What the YAML of `task` says, with what it includes and what it changes; functions by name."""

    def read(path: Path) -> dict[str, Any]:
        config = deepcopy(_parsed(path))
        included: dict[str, Any] = {}
        for name in reversed(list(_strings(config.pop("include", None)))):
            included |= read(path.parent / name)
        return included | config

    config = read(find(task, include_path))
    return {**read(find(config["upstream"], None)), **config} if "upstream" in config else config


def local_data(config: dict[str, Any], data: str | None) -> Path | None:
    """Where in the folder `data` a task's data set is: in the folder named like it; None for a task with own files.

    Raises:
        SvlError: if there is no such folder.
    """
    path = config.get("dataset_path") or ""
    if data is None or path.count("/") != 1 or path.startswith((".", "/")):
        return None  # parquet, json, a folder: beside the YAML file
    copy = Path(data).expanduser() / path.split("/")[1]
    if not copy.is_dir():
        raise SvlError(f"benchmark.data: '{data}' has no folder '{copy.name}', a copy of the data set {path}")
    return copy.absolute()


def check_metric(task: str, metric: str, include_path: str | None) -> None:
    """Raise SvlError unless `task` (or what it includes or changes) lists `metric`."""
    config = settings(task, include_path)
    listed = [entry["metric"] for entry in config.get("metric_list") or []]
    if (name := config.get("upstream")) and "process_results" in config:
        listed += [UPSTREAM + entry["metric"] for entry in settings(name, None)["metric_list"]]
    one_of(f"benchmark.tasks.{task}.metric", metric.partition(",")[0], listed)


def check_style(task: str, style: str, include_path: str | None) -> None:
    """Raise SvlError unless `task` has the prompt style (a key of its `lmms_eval_specific_kwargs`)."""
    styles = [k for k, v in (settings(task, include_path).get("lmms_eval_specific_kwargs") or {}).items() if v]
    one_of(f"benchmark.tasks.{task}.style", style, ["default", *(s for s in styles if s != "default")])


def check_apart(path: str, split: str | None, chosen: Iterable[str], include_path: str | None) -> None:
    """Raise SvlError if calibration data are what a benchmark is scored on.

    With a `split`, `path` is a data set: compared by name with those of the `chosen` tasks and of every task of svl
    ("lmms-lab/ScienceQA" and a folder "ScienceQA" are the same). Without, it is a file: compared by content with the
    chosen tasks' local files.
    """
    if split is not None:
        for task in dict.fromkeys([*chosen, *tasks(OWN)]):
            config = settings(task, include_path)
            theirs = config.get("test_split") or config.get("validation_split") or ""
            if _part(path, split) == _part(config.get("dataset_path") or "", theirs):
                raise SvlError(
                    f"calibration.split: '{split}' of {Path(path).name} is what benchmark task '{task}' is scored on; "
                    "calibrate on another split"
                )
    elif (file := Path(path).expanduser()).is_file():
        size = file.stat().st_size
        for task in chosen:
            source = find(task, include_path)
            for other in data_files(source, settings(task, include_path)):
                if other.stat().st_size == size and file_digest(other) == file_digest(file):
                    raise SvlError(f"calibration.path: '{path}' is what benchmark task '{task}' is scored on")


def _part(path: str, split: str) -> tuple[str, str]:
    """A data set and its split, however they are written."""
    name = re.sub(r"[^a-z0-9]", "", Path(path).name.lower())
    return name, {"val": "validation", "dev": "validation"}.get(base := split.partition("[")[0], base)


def _shipped() -> Path:
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise SvlError("this benchmark needs lmms-eval: pip install 'svl[eval]'")
    return Path(spec.origin).parent / "tasks"


@cache
def _shipped_tasks() -> dict[str, Path]:
    return tasks(_shipped())


def _content(path: Path) -> str:
    """Hash of a file: of its bytes, or of size and both ends if it is large."""
    size = path.stat().st_size
    if size < LARGE:
        return file_digest(path)
    with open(path, "rb") as file:
        ends = file.read(2**20)
        file.seek(-(2**20), 2)
        return hashlib.sha256(str(size).encode() + ends + file.read()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """The files that a task's YAML consists of, itself included."""
    yield path
    yield from path.parent.glob("*.py")
    config = _parsed(path)
    for included in _strings(config.get("include")):
        yield from _files(path.parent / included)
    if "upstream" in config:
        yield from _files(find(config["upstream"], None))
    yield from data_files(path, config)


def data_files(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The local data files that the YAML file at `path`, which says `config`, names relative to itself."""
    options = config.get("dataset_kwargs") or {}
    for name in _strings([config.get("dataset_path"), options.get("data_files"), options.get("data_dir")]):
        for place in map(Path, glob.glob(str(path.parent / name), recursive=True)):
            yield from [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and dict values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
