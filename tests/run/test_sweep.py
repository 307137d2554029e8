"""Sweeps as a whole: plans answered together, jobs that fail, ratios that come to the same."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers.commands import QUIET, numbers, read, run_svl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from svl import config
from svl.config import CONF, PACKAGE
from svl.core import SvlError
from svl.run.pipeline import Run
from svl.run.shared_scores import missing_scores
from svl.run.sweep import check_search, search_objective

WHOLE = ("tracker=none", "paths.store=store", "paths.outputs=out", "benchmark.limit=4", "benchmark.batch_size=3",
         "~benchmark.tasks.svl_demo_existence")  # fmt: skip


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
    run_svl("-m", *jobs, *WHOLE, cwd=tmp_path / "alone")
    printed = run_svl("-m", *jobs, *WHOLE, "together=3", cwd=tmp_path / "together").stdout
    # five plans with the dense one, at most three at once, on each of two tasks
    assert re.findall(r"^svl_demo_\w+: (\d) plans together$", printed, re.MULTILINE) == ["3", "2"] * 2
    assert len(re.findall(r"stored .*2 x evaluate", printed)) == 4
    expected, found = (answers(tmp_path / name / "store") for name in ("alone", "together"))
    assert found == expected
    assert len(found) == 10
    alone, together = (
        [read(file.parent)[1] for file in sorted((tmp_path / name).rglob("result.json"), key=lambda f: f.parent.name)]
        for name in ("alone", "together")
    )
    assert [numbers(result) for result in together] == [numbers(result) for result in alone]
    assert {result["cost"]["samples_per_second"] for result in together} == {None}  # was not measured
    assert all(result["cost"]["samples_per_second"] > 0 for result in alone)


@pytest.mark.parametrize("word", ["recovery=projector", "visual_tokens=fastv"])
def test_what_shares_no_scores_is_left_to_its_job(word, tmp_path):
    """A training, above all: jobs may run side by side, and the sweep's own process would run them one by one."""
    config.register_with_hydra()
    words = (word, "strategy=tail", "n_remove=2", "calibration.samples=2", *WHOLE, f"paths.store={tmp_path / 'store'}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = Run(compose("config", overrides=[*words]), tmp_path)
    assert missing_scores(run) == []
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))


def test_failing_jobs_are_listed_at_the_end(tmp_path):
    done = run_svl("-m", "strategy=tail", "ratio=1.5,0.125,-1", *QUIET, cwd=tmp_path, code=1)
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
    settings = (*WHOLE, "~benchmark.tasks.svl_demo_choice", "together=4")
    done = run_svl("-m", "strategy=tail", "ratio=0.125,1.5,0.25", *settings, cwd=tmp_path, code=1)
    assert "cannot be planned: ratio is 1.5" in done.stdout
    assert "svl_demo_open: 3 plans together" in done.stdout
    assert "1 of 3 jobs failed" in done.stderr


def test_ratios_that_remove_the_same_layers_are_pointed_out(tmp_path):
    done = run_svl("-m", "strategy=tail", "ratio=0.25,0.26,0.125", *QUIET, cwd=tmp_path)
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
    done = run_svl("-m", *jobs, *QUIET, cwd=tmp_path, code=1)
    (root,) = (tmp_path / "out" / "run").iterdir()
    assert [(root / n / "result.json").exists() for n in "0123"] == [True, True, False, False]
    assert "error: 2 of 4 jobs failed" in done.stderr
    assert len(re.findall(r"/[23]: two different models of this sweep are called 'mine'", done.stderr)) == 2
    assert "loaded mine" in (root / "0" / "run.log").read_text()
    assert "loaded mine" not in (root / "2" / "run.log").read_text()  # refused before anything heavy
    run_svl("-m", "model.path=b/mine", "strategy=tail", *QUIET, cwd=tmp_path)  # by itself, it is as good


def test_failures_in_nested_folders_are_listed_and_old_ones_are_not(tmp_path):
    sweep = "hydra.sweep.dir=sweep"
    words = ("-m", "strategy=tail", *QUIET, sweep, "hydra.sweep.subdir=at/${ratio}")
    first = run_svl(*words, "ratio=1.5,1.25,0.125", cwd=tmp_path, code=1)
    assert "error: 2 of 3 jobs failed" in first.stderr
    assert re.findall(r"sweep/(at/\S+): ratio is", first.stderr) == ["at/1.5", "at/1.25"]
    (tmp_path / "sweep" / "at" / "0.125" / "result.json").write_text('{"torn')
    (tmp_path / "sweep" / "at" / "0.25").mkdir()
    (tmp_path / "sweep" / "at" / "0.25" / "failed.txt").write_text("of an earlier start")
    second = run_svl(*words, "ratio=0.125,0.25", cwd=tmp_path)
    assert "error" not in second.stderr


def test_experiments_that_sweep_cannot_be_swept_over(tmp_path):
    done = run_svl("-m", "experiment=demo,scaling_demo", *QUIET, cwd=tmp_path, code=1)
    assert done.stderr.splitlines() == [
        "error: experiment=demo sweeps over strategy, ratio, which is impossible within another sweep: "
        "run one experiment at a time"
    ]
    assert not list(tmp_path.rglob("run.log"))


def test_a_misspelt_method_setting_of_the_last_job_is_found_before_the_first_one_starts(tmp_path):
    done = run_svl("-m", "strategy=tail,random", "strategy.seed=0", *QUIET, cwd=tmp_path, code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: strategy has no setting 'seed'; it has: none (in the job strategy=tail")
    assert not list(tmp_path.rglob("run.log"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["benchmark=none"], "choose a benchmark, not benchmark=none"),
        (["hydra.sweeper.direction=minimize"], "hydra.sweeper.direction must be maximize"),
        (
            ["benchmark=demo", "benchmark.tasks.svl_demo_open.metric=off_format"],
            "a search cannot average losses and scores",
        ),
        (
            ["benchmark=demo", "benchmark.tasks.svl_demo_open.higher_is_better=false"],
            "higher_is_better is false, but higher values of accuracy are better: set it to true, or to null",
        ),
        (
            ["benchmark=prose", "benchmark.tasks.svl_prose_essays.higher_is_better=true"],
            "higher_is_better is true, but lower values of loss are better: set it to false, or to null",
        ),
    ],
)
def test_searches_that_make_no_sense_are_refused_before_the_first_trial(words, reason, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    quiet = [word for word in QUIET if not word.startswith("benchmark")]
    done = run_svl("-m", "experiment=hparams_search", *words, *quiet, cwd=tmp_path, code=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert not list(tmp_path.rglob("run.log"))


def test_a_search_maximises_scores_and_minimises_losses():
    def result(higher: bool, **average: float):
        return {"scores": {"t": {"higher_is_better": higher}}, "average": average or None, "average_note": "no scale"}

    assert search_objective(result(True, value=0.75)) == 0.75
    assert search_objective(result(False, value=2.5)) == -2.5
    with pytest.raises(SvlError, match="undefined for these settings, so they cannot be compared: no scale"):
        search_objective(result(True))


@pytest.mark.parametrize("said", [True, None])
def test_a_search_takes_the_direction_of_a_metric_from_its_task(said):
    """`higher_is_better` was true by default, so that a search maximised losses."""
    tasks = {
        "svl_demo_choice": {"metric": "off_format", "higher_is_better": said},
        "svl_demo_open": {"metric": "off_format", "higher_is_better": said},
    }
    benchmark = {"tasks": tasks, "include_path": str(PACKAGE / "demo" / "tasks")}
    config = OmegaConf.create({"benchmark": benchmark, "hydra": {"sweeper": {"direction": "maximize"}}})
    if said is None:
        check_search(config)
    else:
        with pytest.raises(SvlError, match="lower values of off_format are better"):
            check_search(config)


def test_a_search_is_not_made_on_what_is_reported():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        searched = compose("config", overrides=["experiment=hparams_search"]).benchmark
        reported = compose("config", overrides=["experiment=demo"]).benchmark
    assert set(searched.tasks).isdisjoint(reported.tasks)
    assert searched.tasks
