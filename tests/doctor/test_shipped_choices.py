"""`svl doctor` on every calibration set and benchmark of conf/, from stand-ins with the real cards, and on a hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import run_svl
from helpers.hub_mimics import MIMICS
from helpers.recorded_hub import RecordedHub
from helpers.tasks import benchmark, script
from helpers.video_standins import write_mvbench, write_videomme
from omegaconf import OmegaConf

from svl.config import CONF
from svl.evaluation import benchmarks

pytest.importorskip("lmms_eval")
FINE = "nothing found that would end a run"


def choices(group: str) -> list[str]:
    """The names of the files of a group of conf/."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def standins(tmp_path_factory) -> Path:
    """A copy of every data set that conf/ names, by the last part of its name (or all of it, where two share it)."""
    pytest.importorskip("av")
    folder = script("make_standins").write(tmp_path_factory.mktemp("standins"))
    write_videomme(folder)
    tasks = [task for task in benchmarks.task_files(benchmarks.OWN) if "mvbench" in task]
    write_mvbench(folder, *(task.removeprefix("svl_mvbench_") for task in tasks))
    return folder


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """datasets waits for five seconds when it has read a stream, lest its threads outlive the interpreter."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def doctor(tmp_path):
    """The page for these settings; `code` is the exit status that is expected."""

    def asked(*words, code=0):
        quiet = ("tracker=none", "paths.store=store", "model.device=cpu", "n_remove=1")
        return run_svl("doctor", *quiet, *words, cwd=tmp_path, code=code).stdout

    return asked


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub, asked by this process, with an empty cache."""
    with RecordedHub() as recorded:
        recorded.use_in_this_process(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", recorded.address)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "lmms_eval"))
        yield recorded


def section(page: str, title: str) -> list[str]:
    """The findings of one part of a page."""
    return next(part for part in page.split("\n\n") if part.startswith(title)).splitlines()[1:]


def copy_of(standins: Path, path: str) -> Path | None:
    """The stand-in of a data set of the hub."""
    return next((copy for copy in (standins / path, standins / path.rpartition("/")[2]) if copy.is_dir()), None)


def source_of(choice: str) -> str:
    """What conf/calibration/<choice>.yaml reads."""
    return str(OmegaConf.to_container(OmegaConf.load(CONF / "calibration" / f"{choice}.yaml"))["path"])


# ------------------------------------------------------------------------------------------------ calibration sets


@pytest.mark.parametrize("choice", choices("calibration"))
def test_every_calibration_set_in_a_copy(choice, doctor, standins, checkpoint, tmp_path):
    words = [f"calibration={choice}", "model=local", f"model.path={checkpoint('llava')}", "benchmark=none"]
    copy = copy_of(standins, source_of(choice))
    if choice == "local":
        (tmp_path / "mine.jsonl").write_text('{"prompt": "What?", "answer": "red"}\n')
        words += ["calibration.path=mine.jsonl", "calibration.columns={image: null}"]
    elif copy:
        words += [f"calibration.path={copy}", "calibration.samples=3"]
    page = doctor(*words)
    assert FINE in page
    (found,) = (line for line in section(page, "calibration") if line.startswith("  ok"))
    n = 1 if choice == "local" else 3 if copy else 64
    pictured = 0 if choice in ("local", "wikitext", "prose") else n
    assert f"ok    {n} samples from" in found
    assert f": {pictured} with a picture" in found


@pytest.mark.parametrize(
    "choice", [c for c in choices("calibration") if "/" in source_of(c) and "$" not in source_of(c)]
)
def test_every_calibration_set_of_the_hub(choice, doctor, standins, checkpoint, hub):
    """By its description alone; and what the description lacks is found before a run."""
    path = source_of(choice)
    words = [f"calibration={choice}", "model=local", f"model.path={checkpoint('llava')}", "benchmark=none"]
    (said,) = (line for line in section(doctor(*words, code=1), "calibration") if line.startswith("  FAILS"))
    assert path in said
    hub.add(path, copy_of(standins, path), "datasets")
    page = doctor(*words)
    assert FINE in page
    assert f"ok    data set '{path}' on the hub" in "\n".join(section(page, "calibration"))
    assert not [line for line in hub.requests if line.startswith("GET") and line.endswith(".parquet")]
    (said,) = (line for line in section(doctor(*words, "calibration.split=tran", code=1), "calibration"))
    assert f"'{path}' has no split 'tran'; it has: " in said


def test_a_split_that_the_card_leaves_out_is_missed(doctor, standins, checkpoint, hub):
    """As lmms-lab/ScienceQA's, whose training questions are in its repository all the same."""
    hub.add("owner/ScienceQA", standins / "ScienceQA", "datasets")
    words = ["calibration=scienceqa", "calibration.path=owner/ScienceQA", "calibration.name=ScienceQA-IMG"]
    page = doctor(*words, "model=local", f"model.path={checkpoint('llava')}", "benchmark=none", code=1)
    (said,) = section(page, "calibration")
    assert said == "  FAILS 'owner/ScienceQA' has no split 'train'; it has: test, validation"


# ------------------------------------------------------------------------------------------------------ benchmarks


@pytest.mark.parametrize("choice", choices("benchmark"))
def test_every_benchmark(choice, doctor, standins, checkpoint, hub):
    """On copies; without them, what is not beside the task's own file is missed, task by task, until the hub has it."""
    words = [f"benchmark={choice}", "calibration=demo", "model=local", f"model.path={checkpoint('llava')}"]
    tasks = benchmark(choice).tasks
    page = doctor(*words, f"benchmark.data={standins}")
    assert FINE in page
    found = section(page, "benchmark")
    paths = {task: benchmarks.task_settings(task, benchmark(choice).include_path)["dataset_path"] for task in tasks}
    public = {task: path for task, path in paths.items() if benchmarks.is_hub_name(path)}
    for task in tasks:
        copy = standins / public[task].rpartition("/")[2] if task in public else None
        assert f"  ok    {task}: " + (f"a copy in '{copy}'" if copy else "files beside its YAML") in found
    assert tasks or found == ["  note  none: the model is pruned, but not scored"]
    if len(public) != 1:
        return
    ((task, path),) = public.items()
    (said,) = section(doctor(*words, code=1), "benchmark")
    assert said.startswith(f"  FAILS task '{task}': the data set {path} cannot be had")
    hub.add(path, standins / path.rpartition("/")[2], "datasets")
    assert section(doctor(*words), "benchmark") == [f"  ok    {task}: {path} on the hub or in its cache"]


# ---------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", sorted(MIMICS))
def test_every_model_of_the_hub(name, doctor, mimic, hub):
    """A compensation is refused where the model normalises after its projections, and nowhere else."""
    path = str(OmegaConf.load(CONF / "model" / f"{name}.yaml").path)
    hub.add(path, mimic(name))
    words = [f"model={name}", "calibration=demo", "benchmark=none"]
    normalised = name in ("gemma3_4b", "paligemma2_3b")
    page = doctor(*words, f"compensation={'none' if normalised else 'refit'}")
    assert FINE in page
    found = "\n".join(section(page, "model"))
    assert f"ok    hub id '{path}', commit {hub.repositories['models', path].commit[:12]}" in found
    assert " decoder layers ('" in found
    assert "tokens in the longest sample" in page
    assert not [line for line in hub.requests if line.startswith("GET") and line.endswith((".safetensors", ".bin"))]
    if normalised:
        page = doctor(*words, "compensation=refit", code=1)
        assert [line for line in section(page, "model") if "FAILS" in line and "normalises after" in line]
