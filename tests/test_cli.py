"""The `svl` command as its users run it, on the bundled model."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ENVIRONMENT, QUIET, SMALL, manifests, read, run_svl
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

SCRIPT = Path(sys.executable).with_name("svl")
# --------------------------------------------------------------------------------------------- looking around


def test_help_and_config_from_another_folder(tmp_path):
    """The installed script, and `python -m svl`."""

    def show(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout

    text = show(str(SCRIPT), "--help")
    for group, choice in (("strategy", "short_lvlm"), ("selector", "all"), ("model", "demo_lvlm")):
        assert re.search(rf"^  {group} .*default {choice}\)$", text, re.MULTILINE), text
    assert len(text.splitlines()) < 50
    assert show(str(SCRIPT)) == text
    assert "ratio: 0.5" in show(sys.executable, "-m", "svl", "ratio=0.5", "--cfg", "job")
    assert not list(tmp_path.iterdir())  # looking leaves nothing behind


def test_completion_knows_choices(tmp_path):
    line = "svl strategy=short_lv"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = run_svl("--shell-completion", "query=bash", cwd=tmp_path, **asked)
    assert done.stdout.split() == ["strategy=short_lvlm", "strategy=short_lvlm_paper"]


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of unusable checkpoints, calibration files and configuration."""
    folder = tmp_path_factory.mktemp("inputs")
    vit = {"model_type": "vit", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    texts = [{"image": None, "prompt": "What is it?"}] * 3
    contents: dict[str, Any] = {
        "empty/README.md": "no config.json",
        "vit/config.json": vit,
        "no_image.jsonl": [{"prompt": "What is it?"}],
        "no_prompt.jsonl": [{"image": None, "promt": "What is it?"}],
        "text.jsonl": texts,
        "unreadable.jsonl": [*texts, {"image": "broken.png", "prompt": "What is it?"}],
        "missing.jsonl": [*texts, {"image": "missing.png", "prompt": "What is it?"}],
        "broken.png": "this is no PNG",
        "conf/benchmark/mine.yaml": "name: x\ninclude_path: ${svl:demo}/tasks\ntasks: {svl_demo_opne: {metric: x}}",
        "conf/model/mine.yaml": "pth: somewhere",
        "conf/strategy/mine.yaml": "_target_: svl.strategies.random.Random\nsed: 3",
        "conf/strategy/three.yaml": "# @package _global_\nstrategy: 3",
        "conf/experiment/plain.yaml": "ratio: 0.5",
        "conf/experiment/torn.yaml": "# @package _global_\nratio: [0.5\nseed: 1",
        "conf/experiment/twice.yaml": "# @package _global_\nratio: 0.5\nratio: 0.4",
        "conf/experiment/list.yaml": "# @package _global_\ndefaults: 3",
    }  # fmt: skip
    for name, content in contents.items():  # lists are JSON lines
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, content)) if isinstance(content, list) else content
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


# What is given -> what the one line must say. None of these may get as far as reading the weights.
MISTAKES = {
    "strategy=short_lvm": ["no strategy 'short_lvm'", "did you mean 'short_lvlm'?", "shortgpt"],
    "strategy=wrong/name": ["no strategy 'wrong/name'", "svl list strategy", "--config-dir DIR"],
    "model=empty": ["no model 'empty'", "write model=local model.path=empty"],
    "model=some-owner/name-1.5": ["no model 'some-owner/name-1.5'", "write model=local model.path=some-owner/name-1.5"],
    "calibration=nowhere.json": ["write calibration=local calibration.path=nowhere.json"],
    "calibration=no_image.jsonl": ["write calibration=local calibration.path=no_image.jsonl"],
    "+calibration@recovery.data=./x.json": ["write +calibration@recovery.data=local recovery.data.path=./x.json"],
    "calibration@recovery.data=demo": ["write +calibration@recovery.data=NAME"],
    "+calibration@recovery.data=llava": ["no calibration 'llava' (did you mean 'llava_instruct'?)"],
    "hydra/launcher=ry": ["no hydra/launcher 'ry'", "gpus", "joblib", "slurm"],
    "strategy=": ["no strategy ''", "short_lvlm"],
    "model=demo_lvm": ["no model 'demo_lvm'", "did you mean 'demo_lvlm'?"],
    "selector=tsi": ["no selector 'tsi'", "did you mean 'tis'?"],
    "experiment=dmo": ["no experiment 'dmo'", "did you mean 'demo'?"],
    "rato=0.5": ["no setting 'rato'", "did you mean 'ratio'?", "n_remove"],
    "model.pth=x": ["no setting 'model.pth'", "did you mean 'model.path'?", "model.dtype"],
    "strategy=tail strategy.seed=1": ["strategy has no setting 'seed'"],
    "selector=tis selector.pp=1": ["selector has no setting 'pp'", "did you mean 'p'?"],
    "ratio=half": ["ratio", "'half'", "Float"],
    "ratio=0.25,0.5": ["ratio=0.25,0.5", "add -m"],
    "ratio=1": ["ratio is 1", "[0, 1)"],
    "ratio=20": ["ratio is 20", "[0, 1)", "20 % is ratio=0.2"],
    "ratio=-0.25": ["ratio is -0.25", "[0, 1)"],
    "model=local": ["error: model.path is not set: add model.path="],
    "model.path=/no/such/model": ["model.path", "'/no/such/model'"],
    "model.path=empty": ["model.path", "'empty' has no config.json"],
    "model.path=vit": ["'vit' has no weights"],
    "model.path=owner/unknown": ["model.path", "'owner/unknown'", "hub does not answer"],
    "calibration.path=/no/such.jsonl": ["calibration.path", "no file '/no/such.jsonl'"],
    "calibration.path=no_image.jsonl": ["no_image.jsonl", "no column 'image'", "there are: prompt"],
    "calibration.path=no_prompt.jsonl": ["no_prompt.jsonl", "no column 'prompt'", "did you mean 'promt'?"],
    "calibration.path=unreadable.jsonl": ["unreadable.jsonl", "row 3", "cannot read the picture"],
    "calibration.path=missing.jsonl": ["missing.jsonl", "row 3", "cannot read the picture", "missing.png"],
    "export.path=empty": ["export.path 'empty' exists already"],
    "paths.store=broken.png": ["cannot write stage", "broken.png"],
    "paths.outputs=broken.png": ["Not a directory", "broken.png"],
    "--config-dir conf benchmark=mine": ["no benchmark task 'svl_demo_opne'", "did you mean 'svl_demo_open'?"],
    "--config-dir conf strategy=mnie": ["no strategy 'mnie'", "did you mean 'mine'?"],
    "--config-dir conf strategy=mine": ["strategy has no setting 'sed'", "did you mean 'seed'?"],
    "--config-dir conf strategy=three": ["strategy is 3, but must be a group of settings"],
    "--config-dir conf experiment=plain": ["conf/experiment must begin with the line '# @package _global_'"],
    "--config-dir conf experiment=torn": ["the configuration is no YAML in", "torn.yaml', line 3", "expected"],
    "--config-dir conf experiment=twice": ["the configuration is no YAML in", "twice.yaml', line 3", "duplicate key"],
    "--config-dir conf experiment=list": ["the configuration cannot be composed", "defaults must be a list"],
    "+rato=0.5": ["no setting 'rato'", "did you mean 'ratio'?", "n_remove"],
    "+calibration.sampels=3": ["no setting 'calibration.sampels'", "did you mean 'calibration.samples'?"],
    "seed=${nowhere}": ["seed", "'nowhere' not found"],
    "--config-dir conf model=mine": ["no setting 'model.pth'", "did you mean 'model.path'?"],
}  # fmt: skip


@pytest.mark.parametrize("given", MISTAKES)
def test_mistake_is_one_line_before_the_model_is_loaded(given, inputs, tmp_path):
    where = ["benchmark=none", "tracker=none", f"paths.store={tmp_path / 'store'}", f"paths.outputs={tmp_path / 'out'}"]
    overrides = {o.partition("=")[0]: o for o in where} | {
        o.partition("=")[0]: o for o in given.split() if not o.startswith("--") and "=" in o
    }
    options = ["--config-dir", "conf"] if "--config-dir" in given else []
    done = run_svl(*options, *overrides.values(), cwd=inputs, code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert [part for part in MISTAKES[given] if part not in line] == [], line
    assert "loaded" not in done.stdout
    assert not manifests(tmp_path / "store")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=1", "recovery", "=", "lora"], "'recovery' is no setting: settings are NAME=VALUE, without spaces"),
        *(
            ([word], f"cannot read '{word}': what opens a bracket or a quote closes it")
            for word in (
                "strategy=[a",
                "strategy=shortgpt,",
                "ratio=0.2)",
                "model.path='a",
                "model.path=it's",
                "name=a=b",
            )
        ),
    ],
)
def test_a_word_that_cannot_be_read_is_one_line(words, says, tmp_path):
    (line,) = run_svl(*words, cwd=tmp_path, code=1).stderr.splitlines()
    assert line.startswith(f"error: {says}")


@pytest.mark.parametrize(("word", "says"), [("nosuch", "no command 'nosuch'; commands: "), ("lst", "mean 'list'?")])
def test_a_word_that_is_no_setting_is_taken_for_a_command(word, says, tmp_path):
    (line,) = run_svl(word, "strategy=tail", cwd=tmp_path, code=1).stderr.splitlines()
    assert line.startswith("error: there is no command")
    assert says in line
    assert "NAME=VALUE" in line


def test_mistakes_that_only_the_model_can_tell(inputs, tmp_path):
    """Too many layers, before anything is measured; a selector that leaves no token, after."""
    where = [f"paths.store={tmp_path / 'store'}", f"paths.outputs={tmp_path / 'out'}", "benchmark=none", "tracker=none"]
    few = run_svl("strategy=shortgpt", "n_remove=16", *where, *SMALL, cwd=inputs, code=1)
    assert re.findall("^error: .*", few.stderr, re.MULTILINE) == [
        "error: cannot remove 16 of 16 decoder layers: at most 15 may go"
    ]
    assert not manifests(tmp_path / "store")

    blind = run_svl("strategy=shortgpt", "selector=visual", "calibration.path=text.jsonl", *where, cwd=inputs, code=1)
    (line,) = re.findall("^error: .*", blind.stderr, re.MULTILINE)
    assert "selector 'visual' leaves no token in the calibration set" in line
    assert "Traceback" not in few.stderr + blind.stderr
    (log,) = {p.parent for p in (tmp_path / "out").rglob("failed.txt") if "leaves no token" in p.read_text()}
    assert not (log / "result.json").exists()


def test_a_bug_is_one_line_with_its_traceback_in_files(tmp_path, monkeypatch):
    """A method that raises something else than SvlError is not explained away."""
    (tmp_path / "broken_method.py").write_text(textwrap.dedent("""
        from dataclasses import dataclass

        from svl.core import Strategy

        @dataclass(frozen=True)
        class Broken(Strategy):
            def plan(self, stats, n_remove):
                raise RuntimeError("a bug")
    """))  # fmt: skip
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "broken.yaml").write_text("_target_: broken_method.Broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ("--config-dir", "conf", "strategy=broken", *QUIET)
    done = run_svl(*words, cwd=tmp_path, code=1, SVL_PLUGINS="broken_method")
    (failed,) = (tmp_path / "out").rglob("failed.txt")
    assert done.stderr.splitlines()[-1] == f"error: RuntimeError: a bug (please report it, with {failed})"
    assert "Traceback" not in done.stdout + done.stderr
    for file in (failed, failed.with_name("run.log")):
        assert "Traceback (most recent call last)" in file.read_text()
        assert "RuntimeError: a bug" in file.read_text()


def test_sweep_of_an_experiment_needs_m(tmp_path):
    done = run_svl("experiment=demo", "ratio=2", *QUIET, cwd=tmp_path, code=1)
    assert "this experiment is a sweep over strategy, ratio; add -m to run all of it" in done.stdout


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder with a finished sweep in it, and what the sweep printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run_svl("-m", "strategy=tail,random", "ratio=0.125,0.25", *QUIET, cwd=folder).stdout


def test_sweep_records_every_job(sweep):
    folder, printed = sweep
    assert re.findall(r"^\[(\d)/4", printed, re.MULTILINE) == list("1234")
    (root,) = (folder / "out" / "run").iterdir()
    jobs = list(itertools.product(("tail", "random"), (0.125, 0.25)))
    removed: dict[str, list[list[int]]] = {"tail": [], "random": []}
    for number, (strategy, ratio) in enumerate(jobs):
        plan, result, log = read(root / str(number))
        assert (plan["strategy"], plan["selector"], plan["model"]) == (strategy, None, "demo_lvlm")
        assert (plan["n_layers"], plan["ratio"], plan["n_remove"]) == (16, ratio, 16 * ratio)
        assert len(plan["removed"]) == 16 * ratio
        assert sorted(plan["removed"] + plan["kept"]) == list(range(16))
        assert len(plan["importance"]) == 16
        assert max(plan["importance"][i] for i in plan["removed"]) < min(plan["importance"][i] for i in plan["kept"])
        removed[strategy].append(plan["removed"])
        assert result["plan"] == plan
        assert (result["strategy"], result["ratio"], result["compensation"]) == (strategy, ratio, "none")
        assert result["scores"] == {}
        assert result["cost"]["layers"] == 16 - 16 * ratio
        assert set(result["versions"]) >= {"python", "svl", "torch", "transformers"}
        assert set(result["seconds"]) == {"calibrate", "plan", "compensate", "evaluate"}
        assert re.search(rf"\[{number + 1}/4.*\] strategy={strategy} ratio={ratio}", log)
        assert f"removes layers {plan['removed']}" in log
    assert removed["tail"] == [[13, 14], [11, 12, 13, 14]]
    assert set(removed["random"][0]) < set(removed["random"][1])


def test_same_sweep_again_reuses_every_stage(sweep):
    folder, _ = sweep
    before = manifests(folder / "store")
    again = run_svl("-m", "strategy=tail,random", "ratio=0.125,0.25", *QUIET, "paths.outputs=again", cwd=folder).stdout
    assert manifests(folder / "store") == before
    assert len(re.findall(r"^  stored .*plan", again, re.MULTILINE)) == 4
    assert "loaded" not in again
    first, second = (sorted((folder / where).rglob("result.json")) for where in ("out", "again"))
    assert [p.read_text() for p in first[:4]] == [p.read_text() for p in second]


def test_failing_job_does_not_stop_its_siblings(sweep):
    folder, _ = sweep
    done = run_svl("-m", "strategy=tail", "ratio=0.125,1.5,0.25", *QUIET, "paths.outputs=failing", cwd=folder, code=1)
    (root,) = (folder / "failing" / "run").iterdir()
    assert [(root / n / "result.json").exists() for n in "012"] == [True, False, True]
    assert [(root / n / "failed.txt").exists() for n in "012"] == [False, True, False]
    first, second = done.stderr.splitlines()  # nothing of Hydra's before it
    assert first == "error: 1 of 3 jobs failed (each folder has failed.txt and run.log):"
    assert second.endswith("/1: ratio is 1.5, but must lie in [0, 1): it is the fraction of decoder layers removed")
    assert "Traceback" not in done.stderr
    assert "failed: ratio is 1.5" in (root / "1" / "run.log").read_text()


def test_jobs_are_counted_for_any_kind_of_sweep(tmp_path):
    done = run_svl(
        "-m", "strategy=glob(ta*)", "ratio=range(2,4)", *QUIET, cwd=tmp_path, code=1
    )  # no such ratio: no model
    assert re.findall(r"^\[(\d)/2", done.stdout, re.MULTILINE) == list("12")
    assert "Callback" not in done.stderr


def test_equal_plans_of_other_names_are_shared_but_named_after_their_run(tmp_path):
    common = (*QUIET, *SMALL, "selector=all", "compensation=none", "n_remove=2")
    run_svl("-m", "strategy=shortgpt,short_lvlm", *common, cwd=tmp_path)
    assert len(list((tmp_path / "store" / "plan").iterdir())) == 1
    plans = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").rglob("plan.json"))]
    assert [plan["strategy"] for plan in plans] == ["shortgpt", "short_lvlm"]
    assert plans[0]["removed"] == plans[1]["removed"]


# ----------------------------------------------------------------------------------------------------- export


def test_export_loads_with_plain_transformers(tmp_path):
    run_svl("strategy=tail", "ratio=0.25", *QUIET, "export.path=pruned", cwd=tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned")
    processor = AutoProcessor.from_pretrained(tmp_path / "pruned")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (64, 64))], text=[text], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > 64
    assert len(model.get_decoder().layers) == 12
    assert model.config.layer_pruning["removed"] == [11, 12, 13, 14]
    assert "[11, 12, 13, 14]" in (tmp_path / "pruned" / "README.md").read_text()

    written = (tmp_path / "pruned" / "model.safetensors").stat().st_mtime_ns
    assert "exported to" in run_svl("strategy=tail", "ratio=0.25", *QUIET, "export.path=pruned", cwd=tmp_path).stdout
    other = run_svl("strategy=tail", "ratio=0.125", *QUIET, "export.path=pruned", cwd=tmp_path, code=1)
    assert re.search(r"^error: export\.path '.*pruned' exists already", other.stderr, re.MULTILINE)
    assert "plan " not in other.stdout  # refused before any stage
    assert written == (tmp_path / "pruned" / "model.safetensors").stat().st_mtime_ns
