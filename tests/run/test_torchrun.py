"""A run by several processes gives what one process gives, bit for bit; what fails in one, fails in all."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
from pathlib import Path

import pytest
import yaml
from helpers.commands import QUIET, run_svl
from PIL import Image

DATA = ("calibration.samples=7", "calibration.batch_size=2", "n_remove=2")
METHODS = {
    "short_lvlm": ("strategy=short_lvlm",),
    "sleb": ("strategy=sleb",),
    "laco": ("strategy=laco",),
    "taylor": ("strategy=shortened_taylor", "compensation=none"),
    "iterative": ("strategy=iterative", "strategy@strategy.of=depth_shapley", "compensation=magnitude"),
    "refit": ("strategy=angular", "compensation=refit"),
}


@pytest.fixture
def start_two(fork_server):
    """Start two processes as torchrun does."""

    def start(*words: str, cwd: Path, **environment: str) -> list[int]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        settings = {**meeting, **environment}
        return [fork_server.start(*words, cwd=cwd, **settings, RANK=rank, LOCAL_RANK=rank) for rank in "01"]

    return start


@pytest.fixture
def together(start_two, fork_server):
    """Run two processes; gives them when they have ended."""

    def run(*words: str, cwd: Path, code: int = 0, **environment: str) -> list[int]:
        both = start_two(*words, cwd=cwd, **environment)
        assert [fork_server.wait(process) for process in both] == [code, code], "".join(map(fork_server.log, both))
        return both

    return run


def stored(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Every artifact of the stages before evaluation: what it depends on, and its files' contents."""
    found = {}
    for stage in ("stats", "probe", "plan", "patch"):
        artifacts = []
        for file in (folder / "store" / stage).glob("*/manifest.json"):
            manifest = json.loads(file.read_text())
            output = {name: value for name, value in manifest["output"].items() if name != "work"}
            files = [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(file.parent.glob("[!m]*"))]
            artifacts.append((json.dumps(manifest["inputs"], sort_keys=True), json.dumps(output), *files))
        found[stage] = sorted(artifacts)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_store_what_one_stores(method, together, tmp_path):
    words = (*METHODS[method], *QUIET, *DATA)
    for folder in ("alone", "both"):
        (tmp_path / folder).mkdir()
    run_svl(*words, cwd=tmp_path / "alone")
    together(*words, cwd=tmp_path / "both")
    expected = stored(tmp_path / "alone")
    assert expected["plan"]
    assert bool(expected["probe"]) == (method in ("sleb", "laco", "taylor", "iterative"))
    assert stored(tmp_path / "both") == expected


TRAINING = ("recovery=distill", "recovery.batch_size=2", "recovery.accumulate=2", "strategy=tail", *QUIET, *DATA)


@pytest.fixture
def mixed(tmp_path) -> str:
    """The override for training on questions of which only the first two have a picture."""
    pytest.importorskip("peft")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    rows = [{"prompt": "What is it?", "answer": "a circle", "image": "red.png" if i < 2 else None} for i in range(8)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"recovery.data.path={tmp_path / 'mixed.jsonl'}"


def test_two_processes_train_what_one_trains(together, mixed, tmp_path):
    """Each has one of the two passes of a step, often without a picture, so that its projector has no gradients.

    Weights are equal bit for bit, as halving is exact.
    """
    found = []
    for folder, run, processes in ((tmp_path / "alone", run_svl, 1), (tmp_path / "both", together, 2)):
        folder.mkdir()
        run(*TRAINING, "recovery.steps=5", mixed, cwd=folder)
        (trained,) = (folder / "store" / "recover").iterdir()
        output = json.loads((trained / "manifest.json").read_text())["output"]
        assert output["device"].get("processes", 1) == processes
        found.append((trained / "trained.safetensors", output))
    (weights, alone), (other_weights, both) = found
    assert weights.read_bytes() == other_weights.read_bytes()
    counts = ["steps", "samples", "tokens", "parameters"]
    assert [both[name] for name in counts] == [alone[name] for name in counts]
    assert both["samples"] == 20
    losses = [[point["loss"] for point in output["curve"]] for output in (alone, both)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_two_processes_left_one_finishes(start_two, fork_server, mixed, tmp_path):
    """The first is killed while it trains, with a checkpoint behind it, and the other one ends, too."""
    words = (*TRAINING, "recovery.steps=12", "recovery.save_every=1", mixed)

    def finish(folder: Path) -> bytes:
        run = fork_server.start(*words, cwd=folder)
        assert fork_server.wait(run) == 0, fork_server.log(run)
        (trained,) = folder.glob("store/recover/*/trained.safetensors")
        return trained.read_bytes()

    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    first, other = start_two(*words, cwd=both)
    assert fork_server.interrupt(first, signal.SIGKILL, at="store/unfinished/*/step-*") == -signal.SIGKILL
    assert fork_server.wait(other) not in (0, -signal.SIGKILL)
    assert "error: another process of this run has ended" in fork_server.errors(other)
    assert list(both.glob("store/unfinished/*/step-*"))
    assert finish(both) == finish(alone)


NOTING = """
import os
from svl.models.lvlm import Lvlm

plain = Lvlm.encode

def noting(self, prompts, *args, **kwargs):
    with open("read", "a") as file:
        file.write("".join(f"{os.environ.get('RANK')} {prompt}\\n" for prompt in prompts))
    return plain(self, prompts, *args, **kwargs)

Lvlm.encode = noting
"""


def test_two_processes_share_the_texts_of_a_perplexity(together, tmp_path):
    pytest.importorskip("lmms_eval")
    task = {"task": "texts", "output_type": "perplexity", "dataset_path": "json"}
    task |= {"dataset_kwargs": {"data_files": "texts.jsonl"}, "metric_list": [{"metric": "loss"}]}
    benchmark = {"name": "texts", "include_path": f"{tmp_path}/tasks", "batch_size": 2}
    benchmark |= {"tasks": {"texts": {"metric": "loss"}}}
    texts = ["the of and", "of the", "and the of the of and", "the the of", "of of and the"]
    for name, content in {
        "tasks/texts.yaml": yaml.safe_dump(task),
        "tasks/texts.jsonl": "\n".join(json.dumps({"text": text}) for text in texts),
        "conf/benchmark/texts.yaml": json.dumps(benchmark),
        "plugins/__init__.py": NOTING,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    words = ("--config-dir", f"{tmp_path}/conf", "benchmark=texts", "strategy=tail", "n_remove=0", *QUIET[1:])
    found = []
    for folder, run, environment in (
        ("alone", run_svl, {}),
        ("both", together, {"SVL_PLUGINS": str(tmp_path / "plugins")}),
    ):
        (tmp_path / folder).mkdir()
        run(*words, cwd=tmp_path / folder, **environment)
        (score,) = (tmp_path / folder / "store" / "score").iterdir()
        output = json.loads((score / "manifest.json").read_text())["output"]
        found.append((output["metrics"], (score / "samples.jsonl").read_text()))
    assert found[0] == found[1]
    read = (tmp_path / "both" / "read").read_text().splitlines()
    assert sorted(read) == sorted([*(f"0 {texts[i]}" for i in (0, 1, 4)), *(f"1 {texts[i]}" for i in (2, 3))])


FAILING = """
import os
from {module} import {owner} as owner
from svl.core import SvlError

plain, calls = owner.{name}, []

def failing(*args, **kwargs):
    calls.append(args)
    if os.environ["RANK"] == "1" and len(calls) > 1:
        raise SvlError("row 3 is bad")
    return plain(*args, **kwargs)

owner.{name} = failing
"""


@pytest.mark.parametrize(
    ("module", "owner", "name", "words", "stage"),
    [
        ("svl.calibration", "calibrate", "measure_batch", ("strategy=shortgpt", *QUIET, *DATA), "stats"),
        ("svl.recovery.batches", "Batches", "__call__", (*TRAINING, "recovery.steps=3"), "recover"),
    ],
)
def test_what_fails_in_one_process_ends_both_with_its_reason(
    module, owner, name, words, stage, together, fork_server, tmp_path
):
    """A plug-in makes the second process fail at its second batch."""
    if stage == "recover":
        pytest.importorskip("peft")
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "__init__.py").write_text(FAILING.format(module=module, owner=owner, name=name))
    both = together(*words, cwd=tmp_path, code=1, SVL_PLUGINS=str(tmp_path / "plugins"))
    for process in both:
        assert "row 3 is bad" in fork_server.errors(process)
    assert not list((tmp_path / "store" / stage).glob("*/manifest.json"))
