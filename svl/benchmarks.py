"""Where a benchmark is and what it consists of, without importing torch or lmms-eval.

A benchmark is an lmms-eval task: a YAML file, in a folder of one's own or among the tasks that lmms-eval ships. Task
names are found by reading the files' text (0.15 s for the 1,900 of lmms-eval; its own index parses them, in 6 s).
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from svl.core import SvlError, did_you_mean, one_of
from svl.store import digest, file_digest

_NAME = re.compile(r"""^task:[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """YAML that leaves `!function module.name` a string instead of importing it."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def tasks(include_path: str | None) -> dict[str, Path]:
    """The YAML file of every task below `include_path`, or among the tasks of lmms-eval if it is None.

    Raises:
        SvlError: if there is no such folder, or lmms-eval is not installed.
    """
    folder = Path(include_path) if include_path is not None else _shipped()
    if not folder.is_dir():
        raise SvlError(f"benchmark folder '{include_path}' does not exist")
    return {name: path for path in sorted(folder.rglob("*.yaml")) for name in _NAME.findall(path.read_text("utf-8"))}


def find(task: str, include_path: str | None) -> Path:
    """The YAML file of `task`.

    Raises:
        SvlError: if there is none, naming the closest task there is.
    """
    known = tasks(include_path)
    if task not in known:
        where = f"'{include_path}'" if include_path is not None else "lmms-eval"
        raise SvlError(f"no benchmark task '{task}' in {where}{did_you_mean(task, known)}")
    return known[task]


def fingerprint(task: str, include_path: str | None) -> str:
    """16 hex digits that change when the benchmark does.

    They cover the task's YAML with what it includes, the Python files beside those, the content of data files on this
    machine, and for a task of lmms-eval its version. Data on the hub count by name and revision only.

    Raises:
        SvlError: if there is no such task.
    """
    files = sorted(set(_files(find(task, include_path))))
    version = None if include_path is not None else importlib.metadata.version("lmms_eval")
    return digest([task, version, [[path.name, file_digest(path)] for path in files]])


def check_metric(task: str, metric: str, include_path: str | None) -> None:
    """Raise SvlError unless `task` (its YAML, or one that it includes) lists `metric`."""

    def listed(path: Path) -> list[str]:
        config = yaml.load(path.read_text("utf-8"), _Loader) or {}
        if own := config.get("metric_list"):
            return [entry["metric"] for entry in own]
        return [name for included in _strings(config.get("include")) for name in listed(path.parent / included)]

    one_of(f"benchmark.tasks.{task}.metric", metric.partition(",")[0], listed(find(task, include_path)))


def _shipped() -> Path:
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise SvlError("this benchmark needs lmms-eval: pip install 'svl[eval]'")
    return Path(spec.origin).parent / "tasks"


def _files(path: Path) -> Iterator[Path]:
    """The files that a task's YAML consists of, itself included."""
    yield path
    yield from path.parent.glob("*.py")
    config = yaml.load(path.read_text("utf-8"), _Loader) or {}
    for included in _strings(config.get("include")):
        yield from _files(path.parent / included)
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
