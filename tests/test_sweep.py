"""Sweeps as a whole: plans answered together, jobs that fail, ratios that come to the same."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from omegaconf import OmegaConf
from test_cli import QUIET, numbers, read, svl

from svl.config import PACKAGE
from svl.sweep import _Once

WHOLE = ("tracker=none", "paths.store=store", "paths.outputs=out", "benchmark.limit=5", "benchmark.batch_size=3")


def answers(store) -> dict[str, str]:
    """Every score's answers, by the inputs of its key."""
    found = {}
    for manifest in store.glob("score/*/manifest.json"):
        inputs = json.dumps(json.loads(manifest.read_text())["inputs"], sort_keys=True)
        found[inputs] = (manifest.parent / "samples.jsonl").read_text()
    return found


def test_plans_answered_together_score_as_they_do_alone(tmp_path):
    pytest.importorskip("lmms_eval")
    jobs = ("strategy=tail,random", "ratio=0.125,0.25")
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    svl("-m", *jobs, *WHOLE, cwd=tmp_path / "alone")
    printed = svl("-m", *jobs, *WHOLE, "together=3", cwd=tmp_path / "together").stdout
    # five plans with the dense one, at most three at once, on each of three tasks
    assert re.findall(r"^svl_demo_\w+: (\d) plans together$", printed, re.MULTILINE) == ["3", "2"] * 3
    assert len(re.findall(r"evaluate +stored", printed)) == 4 * 3
    expected, found = (answers(tmp_path / name / "store") for name in ("alone", "together"))
    assert found == expected
    assert len(found) == 15
    alone, together = (
        [read(file.parent)[1] for file in sorted((tmp_path / name).rglob("result.json"), key=lambda f: f.parent.name)]
        for name in ("alone", "together")
    )
    assert [numbers(result) for result in together] == [numbers(result) for result in alone]
    assert {result["cost"]["samples_per_second"] for result in together} == {None}  # was not measured
    assert all(result["cost"]["samples_per_second"] > 0 for result in alone)


def test_jobs_are_composed_once():
    class Loader:
        """As Hydra's."""

        def load_sweep_config(self, master_config, sweep_overrides):
            composed.append(sweep_overrides)
            return OmegaConf.create({"job": {"overrides": sweep_overrides}})

    composed, loader = [], Loader()
    once = _Once(loader)
    first, second = once(None, ["ratio=1"]), once(None, ["ratio=1"])
    first.job.overrides[0] = "ratio=3"  # Hydra writes into what it gets
    assert second == once(None, ["ratio=1"]) == {"job": {"overrides": ["ratio=1"]}}
    assert once(None, ["ratio=2"]).job.overrides == ["ratio=2"]
    assert composed == [["ratio=1"], ["ratio=2"]]
    compose, arguments = once.__reduce__()  # what other processes get
    assert compose(*arguments)(None, ["ratio=1"]) == second
    assert composed == [["ratio=1"], ["ratio=2"], ["ratio=1"]]


def test_failing_jobs_are_listed_at_the_end(tmp_path):
    done = svl("-m", "strategy=tail", "ratio=1.5,0.125,-1", *QUIET, cwd=tmp_path, code=1)
    (root,) = (tmp_path / "out" / "run").iterdir()
    assert [(root / n / "result.json").exists() for n in "012"] == [False, True, False]
    line, *listing = done.stderr.splitlines()[-3:]
    assert line == "error: 2 of 3 jobs failed (each folder has failed.txt and run.log):"
    folders, reasons = zip(*(entry.strip().split(": ", 1) for entry in listing), strict=True)
    assert [folder.endswith(f"/{n}") for folder, n in zip(folders, "02", strict=True)] == [True, True]
    assert [reason.partition(",")[0] for reason in reasons] == ["ratio is 1.5", "ratio is -1"]
    assert "Traceback" not in done.stderr


def test_job_that_cannot_be_planned_does_not_keep_others_from_sharing(tmp_path):
    pytest.importorskip("lmms_eval")
    settings = (*WHOLE, "benchmark.tasks={svl_demo_open:{metric:accuracy}}", "together=4")
    done = svl("-m", "strategy=tail", "ratio=0.125,1.5,0.25", *settings, cwd=tmp_path, code=1)
    assert "cannot be planned: ratio is 1.5" in done.stdout
    assert "svl_demo_open: 3 plans together" in done.stdout
    assert "1 of 3 jobs failed" in done.stderr


def test_ratios_that_remove_the_same_layers_are_pointed_out(tmp_path):
    done = svl("-m", "strategy=tail", "ratio=0.25,0.26,0.125", *QUIET, cwd=tmp_path)
    assert (
        "note: ratios 0.25, 0.26 are the same 4 of 16 layers of demo_lvlm, so they were evaluated once" in done.stderr
    )
    assert len(list((tmp_path / "store" / "plan").iterdir())) == 3


def test_two_models_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(PACKAGE / "demo" / "demo_lvlm", tmp_path / folder / "mine")
    with open(tmp_path / "b" / "mine" / "generation_config.json", "a") as file:
        file.write("\n")
    jobs = ("model.path=a/mine,b/mine", "strategy=tail", "ratio=0.125,0.25")
    done = svl("-m", *jobs, *QUIET, cwd=tmp_path, code=1)
    (root,) = (tmp_path / "out" / "run").iterdir()
    assert [(root / n / "result.json").exists() for n in "0123"] == [True, True, False, False]
    assert "error: 2 of 4 jobs failed" in done.stderr
    assert len(re.findall(r"/[23]: two different models of this sweep are called 'mine'", done.stderr)) == 2
    assert "loaded mine" in (root / "0" / "run.log").read_text()
    assert "loaded mine" not in (root / "2" / "run.log").read_text()  # refused before anything heavy
    svl("-m", "model.path=b/mine", "strategy=tail", *QUIET, cwd=tmp_path)  # by itself, it is as good
