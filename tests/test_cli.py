"""The `svl` command as its users run it: real processes on the bundled model."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(sys.executable).with_name("svl")
QUIET = ("benchmark=none", "tracker=none", "paths.store=store", "paths.outputs=out")
SMALL = ("calibration.samples=4", "calibration.batch_size=2")
# No GPU, no network, one thread; settings of the machine's owner must not matter.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("SVL_", "HYDRA_", "WANDB_"))},
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "svl", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def svl(*arguments: str, cwd: Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end; `code` is the exit status that is expected (None: any but 0)."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code if code is not None else process.returncode != 0, out + err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Plan, result and log of one run's output folder."""
    plan, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "result"))
    return plan, result, (folder / "run.log").read_text()


def manifests(store: Path) -> dict[str, int]:
    """When each finished artifact was written."""
    return {p.relative_to(store).as_posix(): p.stat().st_mtime_ns for p in store.glob("*/*/manifest.json")}


# --------------------------------------------------------------------------------------------- looking around


@pytest.mark.parametrize("command", [[str(SCRIPT)], [sys.executable, "-m", "svl"]], ids=["svl", "python -m svl"])
def test_help_and_config_from_another_folder(command, tmp_path):
    def show(*arguments: str) -> str:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
        ).stdout

    text = show("--help")
    for group, choice in (("strategy", "short_lvlm"), ("selector", "tis"), ("model", "demo_lvlm")):
        assert re.search(rf"^{group}: .*\b{choice}\b", text, re.MULTILINE), text
    assert "ratio: 0.5" in show("ratio=0.5", "--cfg", "job")
    assert not list(tmp_path.iterdir())  # looking leaves nothing behind


def test_importing_the_command_is_light():
    heavy = ("torch", "transformers", "lmms_eval", "datasets", "wandb", "matplotlib", "pyarrow")
    code = f"import sys, svl.cli; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


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
    }  # fmt: skip
    for name, content in contents.items():  # lists are JSON lines
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, content)) if isinstance(content, list) else content
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


# What is given -> what the one line must say. None of these may get as far as reading the weights.
MISTAKES = {
    "strategy=short_lvm": ["no strategy 'short_lvm'", "did you mean 'short_lvlm'?", "shortgpt"],
    "strategy=": ["no strategy ''", "short_lvlm"],
    "model=demo_lvm": ["no model 'demo_lvm'", "did you mean 'demo_lvlm'?"],
    "selector=tsi": ["no selector 'tsi'", "did you mean 'tis'?"],
    "experiment=dmo": ["no experiment 'dmo'", "did you mean 'demo'?"],
    "rato=0.5": ["no setting 'rato'", "did you mean 'ratio'?", "n_remove"],
    "model.pth=x": ["no setting 'model.pth'", "did you mean 'model.path'?", "model.dtype"],
    "strategy=tail strategy.seed=1": ["no setting 'strategy.seed'"],
    "selector=tis selector.pp=1": ["no setting 'selector.pp'", "did you mean 'selector.p'?"],
    "ratio=half": ["ratio", "'half'", "Float"],
    "ratio=0.25,0.5": ["ratio=0.25,0.5", "add -m"],
    "ratio=1": ["ratio is 1", "[0, 1)"],
    "ratio=-0.25": ["ratio is -0.25", "[0, 1)"],
    "model=local": ["model.path is not set"],
    "model.path=/no/such/model": ["model.path", "'/no/such/model'"],
    "model.path=empty": ["model.path", "'empty' has no config.json"],
    "model.path=vit": ["'vit' is a vit model", "no decoder layers"],
    "model.path=owner/unknown": ["model.path", "'owner/unknown'", "hub does not answer"],
    "calibration.path=/no/such.jsonl": ["calibration.path", "no file '/no/such.jsonl'"],
    "calibration.path=no_image.jsonl": ["no_image.jsonl", "no column 'image'", "it has: prompt"],
    "calibration.path=no_prompt.jsonl": ["no_prompt.jsonl", "no column 'prompt'", "did you mean 'promt'?"],
    "calibration.path=unreadable.jsonl": ["unreadable.jsonl", "row 3", "cannot read the image"],
    "calibration.path=missing.jsonl": ["missing.jsonl", "row 3", "cannot read the image", "missing.png"],
    "export.path=empty": ["export.path 'empty' exists already"],
    "paths.store=broken.png": ["cannot write stage", "broken.png", "Not a directory"],
    "paths.outputs=broken.png": ["Not a directory", "broken.png"],
    "--config-dir conf benchmark=mine": ["no benchmark task 'svl_demo_opne'", "did you mean 'svl_demo_open'?"],
    "--config-dir conf strategy=mnie": ["no strategy 'mnie'", "did you mean 'mine'?"],
    "--config-dir conf strategy=mine": ["strategy has no setting 'sed'", "did you mean 'seed'?"],
    "--config-dir conf model=mine": ["no setting 'model.pth'", "did you mean 'model.path'?"],
}  # fmt: skip


@pytest.mark.parametrize("given", MISTAKES)
def test_mistake_is_one_line_before_the_model_is_loaded(given, inputs, tmp_path):
    where = ["benchmark=none", "tracker=none", f"paths.store={tmp_path / 'store'}", f"paths.outputs={tmp_path / 'out'}"]
    overrides = {o.partition("=")[0]: o for o in where} | {
        o.partition("=")[0]: o for o in given.split() if not o.startswith("--") and "=" in o
    }
    options = ["--config-dir", "conf"] if "--config-dir" in given else []
    done = svl(*options, *overrides.values(), cwd=inputs, code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert [part for part in MISTAKES[given] if part not in line] == [], line
    assert "loaded" not in done.stdout
    assert not manifests(tmp_path / "store")


def test_mistakes_that_only_the_model_can_tell(inputs, tmp_path):
    """Too many layers, before anything is measured; a selector that leaves no token, after."""
    where = [f"paths.store={tmp_path / 'store'}", f"paths.outputs={tmp_path / 'out'}", "benchmark=none", "tracker=none"]
    few = svl("strategy=shortgpt", "n_remove=16", *where, *SMALL, cwd=inputs, code=1)
    assert re.findall("^error: .*", few.stderr, re.MULTILINE) == [
        "error: cannot remove 16 of 16 decoder layers: at most 15 may go"
    ]
    assert not manifests(tmp_path / "store")

    blind = svl("strategy=shortgpt", "selector=visual", "calibration.path=text.jsonl", *where, cwd=inputs, code=1)
    (line,) = re.findall("^error: .*", blind.stderr, re.MULTILINE)
    assert "selector 'visual' leaves no token in the calibration set" in line
    assert "Traceback" not in few.stderr + blind.stderr
    (log,) = {p.parent for p in (tmp_path / "out").rglob("failed.txt") if "leaves no token" in p.read_text()}
    assert not (log / "result.json").exists()


def test_bug_keeps_its_traceback(tmp_path):
    """A method that raises something else than SvlError is not explained away."""
    (tmp_path / "broken_method.py").write_text(textwrap.dedent("""
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Broken:
            def __post_init__(self):
                raise RuntimeError("a bug")
    """))  # fmt: skip
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "broken.yaml").write_text("_target_: broken_method.Broken\n")
    done = subprocess.run(
        [sys.executable, "-m", "svl", "--config-dir", "conf", "strategy=broken", *QUIET],
        env={**ENVIRONMENT, "SVL_PLUGINS": "broken_method", "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: a bug" in done.stderr
    (failed,) = (tmp_path / "out").rglob("failed.txt")
    assert "RuntimeError: a bug" in failed.read_text()


def test_sweep_of_an_experiment_needs_m(tmp_path):
    done = svl("experiment=demo", "ratio=2", *QUIET, cwd=tmp_path, code=1)
    assert "this experiment is a sweep over strategy, ratio; add -m to run all of it" in done.stdout


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder with a finished sweep in it, and what the sweep printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, svl("-m", "strategy=tail,random", "ratio=0.125,0.25", *QUIET, cwd=folder).stdout


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
    again = svl("-m", "strategy=tail,random", "ratio=0.125,0.25", *QUIET, "paths.outputs=again", cwd=folder).stdout
    assert manifests(folder / "store") == before
    assert len(re.findall(r"plan +stored", again)) == 4
    assert "loaded" not in again
    first, second = (sorted((folder / where).rglob("result.json")) for where in ("out", "again"))
    assert [p.read_text() for p in first[:4]] == [p.read_text() for p in second]


def test_failing_job_does_not_stop_its_siblings(sweep):
    folder, _ = sweep
    done = svl("-m", "strategy=tail", "ratio=0.125,1.5,0.25", *QUIET, "paths.outputs=failing", cwd=folder, code=1)
    (root,) = (folder / "failing" / "run").iterdir()
    assert [(root / n / "result.json").exists() for n in "012"] == [True, False, True]
    assert [(root / n / "failed.txt").exists() for n in "012"] == [False, True, False]
    assert done.stderr.splitlines()[-1].endswith(
        "/1: ratio is 1.5, but must lie in [0, 1): it is the fraction of decoder layers removed"
    )
    assert "Traceback" not in done.stderr
    assert "failed: ratio is 1.5" in (root / "1" / "run.log").read_text()


def test_jobs_are_counted_for_any_kind_of_sweep(tmp_path):
    done = svl("-m", "strategy=glob(ta*)", "ratio=range(2,4)", *QUIET, cwd=tmp_path, code=1)  # no such ratio: no model
    assert re.findall(r"^\[(\d)/2", done.stdout, re.MULTILINE) == list("12")
    assert "Callback" not in done.stderr


def test_equal_plans_of_other_names_are_shared_but_named_after_their_run(tmp_path):
    common = (*QUIET, *SMALL, "selector=all", "compensation=none", "n_remove=2")
    svl("-m", "strategy=shortgpt,short_lvlm", *common, cwd=tmp_path)
    assert len(list((tmp_path / "store" / "plan").iterdir())) == 1
    plans = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").rglob("plan.json"))]
    assert [plan["strategy"] for plan in plans] == ["shortgpt", "short_lvlm"]
    assert plans[0]["removed"] == plans[1]["removed"]


# ----------------------------------------------------------------------------------------- killed and together


def kill_when(pattern: str, arguments: tuple[str, ...], cwd: Path) -> None:
    """Start a run and SIGKILL it as soon as a file of the store matches `pattern`."""
    process = start(*arguments, cwd=cwd)
    deadline = time.monotonic() + 600
    while not list((cwd / "store").glob(pattern)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {pattern} to kill the run at: {process.communicate()}")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what may differ from run to run: times, speeds, a source tree that is being edited."""
    return {k: v for k, v in result.items() if k not in ("seconds", "cost", "versions")}


def test_killed_run_resumes_to_the_same_result(tmp_path):
    pytest.importorskip("lmms_eval")
    # 12 batches: time enough to be killed between two of them
    command = ("strategy=short_lvlm", "benchmark=demo", "benchmark.limit=2", "tracker=none", "paths.store=store",
               "paths.outputs=out", "calibration.samples=24", "calibration.batch_size=2")  # fmt: skip
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    svl(*command, cwd=tmp_path / "whole")
    store = tmp_path / "killed" / "store"
    finished: set[str] = set()
    for stage in ("tmp/stats-*/traces-00001.safetensors", "plan/*/manifest.json", "tmp/score-*"):
        kill_when(stage, command, tmp_path / "killed")
        now = set(manifests(store))
        assert finished <= now
        finished = now
    assert {name.split("/")[0] for name in finished} >= {"stats", "plan", "patch"}
    before = manifests(store)
    printed = svl(*command, cwd=tmp_path / "killed").stdout
    assert [bool(re.search(rf"{stage} +stored", printed)) for stage in ("calibrate", "plan", "compensate")] == [
        True
    ] * 3
    assert {name: manifests(store)[name] for name in before} == before  # finished stages were not touched
    assert not list((store / "tmp").iterdir())
    assert set(manifests(store)) == set(manifests(tmp_path / "whole" / "store"))
    whole, resumed = (
        next(read(p.parent) for p in (tmp_path / name / "out").rglob("result.json")) for name in ("whole", "killed")
    )
    assert resumed[0] == whole[0]
    assert numbers(resumed[1]) == numbers(whole[1])
    assert whole[1]["scores"]["svl_demo_open"]["n"] == 2


def test_two_processes_on_one_store_calibrate_once(tmp_path):
    command = ("strategy=shortgpt", *QUIET, "calibration.samples=16", "calibration.batch_size=2")
    both = [start(*command, cwd=tmp_path) for _ in range(2)]
    printed = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(list((tmp_path / "store" / "stats").glob("*/manifest.json"))) == 1
    assert sorted(bool(re.search(r"calibrate +stored", text)) for text in printed) == [False, True]
    first, second = (read(p.parent) for p in (tmp_path / "out").rglob("result.json"))
    assert first[:2] == second[:2]


# ----------------------------------------------------------------------------------------------------- export


def test_export_loads_with_plain_transformers(tmp_path):
    svl("strategy=tail", "ratio=0.25", *QUIET, "export.path=pruned", cwd=tmp_path)
    code = """
        import sys
        sys.modules["svl"] = None  # cannot be imported
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained("pruned")
        processor = AutoProcessor.from_pretrained("pruned")
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}]
        text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        inputs = processor(images=[Image.new("RGB", (64, 64))], text=[text], return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        print(len(model.get_decoder().layers), model.config.layer_pruning["removed"], answer.shape[1] > 64)
    """
    loaded = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert loaded.stdout == "12 [11, 12, 13, 14] True\n", loaded.stderr
    assert "[11, 12, 13, 14]" in (tmp_path / "pruned" / "README.md").read_text()

    written = (tmp_path / "pruned" / "model.safetensors").stat().st_mtime_ns
    assert "exported to" in svl("strategy=tail", "ratio=0.25", *QUIET, "export.path=pruned", cwd=tmp_path).stdout
    other = svl("strategy=tail", "ratio=0.125", *QUIET, "export.path=pruned", cwd=tmp_path, code=1)
    assert re.search(r"^error: export\.path '.*pruned' exists already", other.stderr, re.MULTILINE)
    assert written == (tmp_path / "pruned" / "model.safetensors").stat().st_mtime_ns
