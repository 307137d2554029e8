"""Copies of data sets in `benchmark.data`: read without asking anyone, archives named."""

from __future__ import annotations

import socket
import tarfile
from pathlib import Path

import pytest
import yaml

from svl.core import SvlError
from svl.evaluation.settings import TaskOptions

datasets = pytest.importorskip("datasets")
pytest.importorskip("lmms_eval")


@pytest.fixture
def task(tmp_path):
    """A task on a data set of the hub, and the folder of its copy."""
    (tmp_path / "tasks").mkdir()
    settings = {
        "task": "asked", "dataset_path": "owner/Asked", "test_split": "testdev", "output_type": "generate_until",
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "tasks" / "asked.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "copies" / "Asked" / "data").mkdir(parents=True)
    options = TaskOptions("exact_match", include_path=str(tmp_path / "tasks"), data=str(tmp_path / "copies"))
    return options, tmp_path / "copies" / "Asked"


def write_rows(file: Path, *questions: str) -> None:
    datasets.Dataset.from_dict({"question": list(questions), "answer": ["a"] * len(questions)}).to_parquet(file)


def questions(options: TaskOptions) -> list[str]:
    from svl.evaluation.lmms_tasks import load_task

    loaded = load_task("asked", options)
    return [document["question"] for document in loaded.task.eval_docs]


def test_a_copy_without_a_card_is_read_by_the_names_of_its_files(task):
    options, copy = task
    write_rows(copy / "data" / "testdev-00000-of-00002.parquet", "one")
    write_rows(copy / "data" / "testdev-00001-of-00002.parquet", "two")
    write_rows(copy / "data" / "train-00000-of-00001.parquet", "three")
    assert questions(options) == ["one", "two"]


@pytest.mark.parametrize("pattern", ["https://example.org/x.parquet", "../*.parquet", "/etc/*"])
def test_the_card_of_a_copy_makes_nobody_fetch_addresses(pattern, task, monkeypatch):
    options, copy = task
    asked = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    write_rows(copy / "data" / "x.parquet", "one")
    files = [{"split": "testdev", "path": pattern}]
    card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
    (copy / "README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(SvlError, match="which is not inside the folder"):
        questions(options)
    assert not asked


def test_a_web_dataset_is_named(task):
    options, copy = task
    with tarfile.open(copy / "shard-000.tar", "w") as archive:
        archive.add(__file__, "0.txt")
    with pytest.raises(SvlError, match=r"benchmark\.data: '.*Asked' has a WebDataset, 1 archives, which are not read"):
        questions(options)
