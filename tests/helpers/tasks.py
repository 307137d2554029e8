"""Benchmarks for tests: scripts as modules, data files as rows, tasks of one's own, and scores with their samples."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from helpers.paths import ROOT

DEMO = ROOT / "svl" / "demo"
TASKS = str(DEMO / "tasks")
Rows = list[dict[str, Any]]


@cache
def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_rows(path: Path) -> Rows:
    """A data file's rows, images as PNG bytes."""
    import datasets

    table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    return table.cast_column("image", datasets.Image(decode=False)).to_list()


def sample_rows(folder: Path) -> Rows:
    """The lines of a score's `samples.jsonl`."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def score_task(model: Any, task: str, folder: Path, **options: Any) -> tuple[dict[str, Any], Rows]:
    """`evaluate` with defaults for the bundled tasks -> (result, rows of samples.jsonl)."""
    from svl.evaluation.evaluate import evaluate
    from svl.evaluation.settings import TaskOptions

    chosen = TaskOptions(**{"metric": "accuracy", "include_path": TASKS, "batch_size": 8, **options})
    return evaluate(model, task, chosen, folder), sample_rows(folder)


def task_folder(folder: Path, body: str, documents: Rows) -> str:
    """A folder with a text-only task `custom` of our own scoring; `body` is appended to its YAML."""
    folder.mkdir()
    (folder / "data.json").write_text("\n".join(map(json.dumps, documents)))
    shutil.copy(DEMO / "tasks" / "utils.py", folder)
    (folder / "custom.yaml").write_text(
        "task: custom\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: prompt\ndoc_to_target: answer\n"
        "metric_list:\n  - {metric: accuracy, aggregation: !function utils.accuracy, higher_is_better: true}\n" + body
    )
    return str(folder)


@cache
def benchmark(name: str) -> Any:
    """The composed configuration of conf/benchmark/<name>.yaml."""
    from hydra import compose, initialize_config_dir

    from svl import config

    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", overrides=[f"benchmark={name}"]).benchmark
