"""What a benchmark is scored on is refused, whatever it is called and however it is read."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml
from helpers.paths import ROOT

from svl.core import SvlError
from svl.data.hub_data import HubSource
from svl.data.row_formats import RowOptions
from svl.evaluation.held_out import check_not_evaluated_on
from svl.evaluation.settings import TaskOptions

TASKS = str(ROOT / "svl" / "demo" / "tasks")
DATA = ROOT / "svl" / "demo" / "data"


def chosen(*names: str, include_path: str = TASKS) -> dict[str, TaskOptions]:
    return {name: TaskOptions("accuracy", include_path=include_path) for name in names}


def drawn(path: object, split: str) -> HubSource:
    return HubSource(str(path), 4, split=split, options=RowOptions("question"))


@pytest.mark.parametrize(
    ("path", "split", "task"),
    [
        ("lmms-lab/ScienceQA", "test", "svl_scienceqa"),
        ("/copies/ScienceQA", "test[:10]", "svl_scienceqa"),
        ("HuggingFaceM4/A-OKVQA", "validation", "svl_aokvqa"),
        ("other/AOKVQA", "val", "svl_aokvqa"),
        ("Lin-Chen/MMStar", "val", "svl_mmstar"),
        ("lmms-lab/MMBench", "dev", "svl_mmbench"),
        ("lmms-lab/POPE", " test", "svl_pope"),
        ("lmms-lab/POPE", "test+test", "svl_pope"),
    ],
)
def test_nothing_is_calibrated_on_what_is_scored(path, split, task):
    with pytest.raises(SvlError, match=f"'{re.escape(split)}' of .* is what benchmark task '{task}' is scored on"):
        check_not_evaluated_on(path, drawn(path, split), {})
    check_not_evaluated_on(path, drawn(path, "train"), {})


@pytest.mark.parametrize("split", ["all", "train+test", "train[:50%] + test[10:20]"])
def test_no_part_of_what_is_read_is_scored(split):
    with pytest.raises(SvlError, match=f"'{re.escape(split)}' of ScienceQA holds what benchmark task 'svl_scienceqa'"):
        check_not_evaluated_on("lmms-lab/ScienceQA", drawn("lmms-lab/ScienceQA", split), {})
    check_not_evaluated_on("lmms-lab/ScienceQA", drawn("lmms-lab/ScienceQA", "train+validation"), {})


def test_a_copy_of_a_benchmark_is_refused_without_a_format(tmp_path):
    file = tmp_path / "POPE" / "data" / "test-00000-of-00001.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"question": "Is there a dog?", "answer": "no"}\n')
    for path in (tmp_path / "POPE", file.parent, file):
        with pytest.raises(SvlError, match=r"recovery\.data\.path: .* what benchmark task 'svl_pope' is scored on"):
            check_not_evaluated_on(str(path), None, {}, "recovery.data")
    other = shutil.copy(file, file.with_name("train.jsonl"))
    check_not_evaluated_on(str(other), None, {}, "recovery.data")


def test_no_file_is_both_calibration_set_and_benchmark(tmp_path):
    copied = shutil.copy(DATA / "open.parquet", tmp_path / "mine.parquet")
    both = chosen("svl_demo_choice", "svl_demo_open")
    with pytest.raises(SvlError, match=r"mine\.parquet' is what benchmark task 'svl_demo_open' is scored on"):
        check_not_evaluated_on(str(copied), None, both)
    check_not_evaluated_on(str(copied), None, chosen("svl_demo_choice"))
    check_not_evaluated_on(str(DATA / "calibration.parquet"), None, both)


@pytest.mark.parametrize("kind", ["whole", "train", "all"])
def test_no_folder_holds_a_file_of_a_benchmark(kind, tmp_path):
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    shutil.copy(DATA / "calibration.parquet", tmp_path / "mine" / "first.parquet")
    source = None if kind == "whole" else drawn(tmp_path / "mine", kind)
    check_not_evaluated_on(str(tmp_path / "mine"), source, chosen("svl_demo_open"))
    shutil.copy(DATA / "open.parquet", tmp_path / "mine" / "inner" / "second.parquet")
    with pytest.raises(SvlError, match=r"second\.parquet' is what benchmark task 'svl_demo_open' is scored on"):
        check_not_evaluated_on(str(tmp_path / "mine"), source, chosen("svl_demo_open"))


def test_a_task_may_name_training_data_of_its_own(tmp_path):
    """One folder with both, drawn by split: only the scored file is refused."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"question": "Which {split}?", "answer": "this"}}\n')
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
        "test_split": "test",
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    tasks = chosen("mine", include_path=str(tmp_path))
    check_not_evaluated_on(str(tmp_path), drawn(tmp_path, "train"), tasks)
    check_not_evaluated_on(str(tmp_path / "train.jsonl"), None, tasks)
    for path, source in ((tmp_path, drawn(tmp_path, "test")), (tmp_path / "test.jsonl", None), (tmp_path, None)):
        with pytest.raises(SvlError, match=r"test\.jsonl' is what benchmark task 'mine' is scored on"):
            check_not_evaluated_on(str(path), source, tasks)
