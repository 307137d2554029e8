"""Evaluation in whole runs: the same answers twice, in any order, batch or number of processes, and after a failure."""

from __future__ import annotations

import copy
import importlib
import json
import socket
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.commands import ENVIRONMENT, run_svl
from helpers.paths import ROOT
from helpers.tasks import score_task
from hydra import compose, initialize_config_dir
from transformers import AutoProcessor

import svl
from svl import config
from svl.core import Plan, SvlError
from svl.doctor.command import examine
from svl.evaluation.answerer import Answerer
from svl.evaluation.vllm import vllm_answerer
from svl.run.setup import RunSetup

pytest.importorskip("lmms_eval")
evaluation = importlib.import_module("svl.evaluation.evaluate")


@pytest.fixture(scope="module")
def demo():
    return svl.load(ROOT / "svl" / "demo" / "demo_lvlm", device="cpu")


def predictions(lvlm, folder: Path, task: str = "svl_demo_open", **options: Any) -> list[Any]:
    _, rows = score_task(lvlm, task, folder, **{"limit": 12, **options})
    return [row["prediction"] for row in rows]


@pytest.mark.parametrize("task", ["svl_demo_existence", "svl_demo_choice", "svl_demo_open"])
def test_answers_are_the_same_twice_and_in_batches_of_any_size(task, demo, tmp_path):
    first = predictions(demo, tmp_path, task)
    assert first == predictions(demo, tmp_path, task) == predictions(demo, tmp_path, task, batch_size=1)
    assert len(set(first)) > 1


@pytest.mark.parametrize("fails", [False, True])
def test_batches_prepared_ahead_are_answered_the_same(fails, demo, tmp_path, monkeypatch):
    """In a thread, while the batch before is answered; a document that cannot be read is named all the same."""
    expected = predictions(demo, tmp_path, batch_size=4)
    threads, read = [], Answerer.conversation

    def conversation(self, request):
        threads.append(threading.current_thread() is threading.main_thread())
        if fails and request.doc_id == 11:
            raise ValueError("cannot be read")
        return read(self, request)

    monkeypatch.setattr(Answerer, "conversation", conversation)
    monkeypatch.setattr(Answerer, "on_accelerator", True)
    if fails:
        with pytest.raises(SvlError, match=r"no answer to document 11: cannot be read"):
            predictions(demo, tmp_path, batch_size=1)
        return
    assert predictions(demo, tmp_path, batch_size=4) == expected
    # the first document for its prompt, the first batch twice, and the other two
    assert sorted(threads) == [False] * 8 + [True] * (1 + 4 + 4)


def test_pruning_in_place_never_gives_old_answers(demo, tmp_path):
    """Nothing between two evaluations of one model object remembers answers."""
    from svl.pruning import surgery

    mine = replace(demo, model=copy.deepcopy(demo.model))
    before = predictions(mine, tmp_path)
    pruned = surgery.apply(mine, Plan(demo.anatomy.n_layers, (2, 5, 8)))
    apart = predictions(pruned, tmp_path)
    layers = mine.layers
    for i in (2, 5, 8):  # in place: the layer passes its input on
        layers[i].forward = lambda hidden_states, *args, **kwargs: hidden_states
    again = predictions(mine, tmp_path)
    assert before != again
    assert again == apart
    for i in (2, 5, 8):
        del layers[i].forward
    assert predictions(mine, tmp_path) == before


def test_order_of_questions_does_not_matter(demo, tmp_path):
    table = datasets.Dataset.from_parquet(str(ROOT / "svl/demo/data/open.parquet"), cache_dir=str(tmp_path / "c"))
    table = table.select(range(24))
    for name, rows in (("a", range(24)), ("b", reversed(range(24)))):
        folder = tmp_path / name
        folder.mkdir()
        table.select(list(rows)).to_parquet(folder / "data.parquet")
        for file in ("_common.yaml", "utils.py"):
            (folder / file).write_text((ROOT / "svl/demo/tasks" / file).read_text())
        text = (ROOT / "svl/demo/tasks/svl_demo_open.yaml").read_text()
        (folder / "task.yaml").write_text(text.replace("../data/open.parquet", "data.parquet"))
    one, other = (predictions(demo, tmp_path, include_path=str(tmp_path / name), limit=None) for name in "ab")
    assert one == other[::-1]


COMMON = ("tracker=none", "strategy=manual", "strategy.layers=[3,9]", "selector=all", "compensation=none", "name=x",
          "benchmark=demo", "benchmark.limit=9", "benchmark.batch_size=4",
          "paths.outputs=out", "paths.store=store")  # fmt: skip


def stored(folder: Path) -> dict[tuple[Any, ...], Any]:
    """(task, layers removed) -> what does not depend on the clock of every score in the store, with its samples."""
    found = {}
    for file in (folder / "store" / "score").glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        output = {k: manifest["output"][k] for k in ("metrics", "n", "limit", "prompt")}
        key = (manifest["inputs"]["task"], tuple(manifest["inputs"]["removed"]))
        found[key] = (output, (file.parent / "samples.jsonl").read_text())
    return found


def taken_out(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The metrics whose names begin so; they are no longer among the others."""
    return {name: metrics.pop(name) for name in list(metrics) if name.startswith(prefix)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_svl(*COMMON, cwd=folder)
    assert len(stored(folder)) == 6
    return folder


def test_two_processes_give_what_one_gives(alone, demo, fork_server, tmp_path):
    """Answers, scores and, asked for besides, likelihoods."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = (*COMMON, "benchmark.likelihood=true")
    both = [fork_server.start(*words, cwd=tmp_path, **meeting, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    assert [fork_server.wait(run) for run in both] == [0, 0], "".join(map(fork_server.log, both))
    found = stored(tmp_path)
    likely = {key: taken_out(output["metrics"], "likelihood_") for key, (output, _) in found.items()}
    assert found == stored(alone)
    plain, _ = score_task(demo, "svl_demo_choice", tmp_path, limit=9, likelihood=True)
    assert likely["svl_demo_choice", ()] == taken_out(plain["metrics"], "likelihood_") != {}
    # By torchrun itself, when everything is stored: nothing to do together.
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "svl")
    done = subprocess.run(
        [sys.executable, *start, *words], env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(stored(tmp_path)) == len(found)
    pages = [file.read_text() for file in (tmp_path / "out").rglob("flips.md")]
    assert len(pages) == 2  # of the first process only
    assert pages[0] == pages[1]
    assert "limit=9" in pages[0]


def test_tables_for_papers_refuse_limits(alone, tmp_path):
    from svl import report

    words = ["experiment=x", f"store={alone / 'store'}", f"out={tmp_path / 'report'}"]
    assert report.main(words) == 0
    assert "(limit=9)" in (tmp_path / "report" / "table.md").read_text()
    assert ",9," in (tmp_path / "report" / "results.csv").read_text()
    assert report.main([*words, f"paper={tmp_path / 'paper.csv'}"]) == 1
    assert not (tmp_path / "paper.csv").exists()


def test_a_failure_keeps_what_is_finished(tmp_path, monkeypatch):
    """The third benchmark fails; the first two stay, and the next run goes on with the third."""
    from svl.run import pipeline

    sample = ["tracker=none", "strategy=tail", "benchmark=demo", "benchmark.limit=4", f"paths.store={tmp_path}/store"]
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*sample, f"paths.outputs={tmp_path}/out", "ratio=0.125"])
    folder = tmp_path / "out"
    folder.mkdir()
    answer, broken = evaluation.Answerer.answer, [True]
    asked: list[str] = []

    def fail(self, conversations, cap):
        asked.append(self.description.strip())
        if broken[0] and "open" in self.description:
            raise IndexError("list index out of range")
        return answer(self, conversations, cap)

    monkeypatch.setattr(evaluation.Answerer, "answer", fail)
    with pytest.raises(SvlError, match=r"task 'svl_demo_open': no answer to documents 0, 1, 2, 3 .*: IndexError"):
        pipeline.run_configuration(cfg, folder)
    assert set(stored(tmp_path)) == {("svl_demo_existence", ()), ("svl_demo_choice", ())}
    broken[0] = False
    asked.clear()
    result = pipeline.run_configuration(cfg, folder)
    assert asked[0] == "svl_demo_open"
    assert set(result["scores"]) == {"svl_demo_existence", "svl_demo_choice", "svl_demo_open"}
    assert all(score["change"]["agreement"] <= 1 for score in result["scores"].values())


FAKE = '''
"""What lmms-eval's adapter uses of vLLM, on transformers."""

import base64
import io

from PIL import Image


class SamplingParams:
    def __init__(self, max_tokens, temperature, top_p, **more):
        assert (temperature, top_p, more) == (0, 1, {})
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, model, tensor_parallel_size, gpu_memory_utilization, **more):
        import svl

        assert (tensor_parallel_size, gpu_memory_utilization) == (1, 0.7)
        self.lvlm = svl.load(model, device="cpu")

    def chat(self, messages, sampling_params, chat_template):
        outputs = []
        for (message,), params in zip(messages, sampling_params, strict=True):
            parts, images = [], []
            for part in message["content"]:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    images.append(Image.open(io.BytesIO(data)).convert("RGB"))
                    part = {"type": "image"}
                parts.append(part)
            text = self.lvlm.render([{"role": "user", "content": parts}])
            inputs = self.lvlm.encode([text], [images])
            tokens = self.lvlm.model.generate(**inputs, max_new_tokens=params.max_tokens, do_sample=False)
            answer = self.lvlm.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            outputs.append(type("Out", (), {"outputs": [type("Text", (), {"text": answer})]}))
        return outputs

    def get_metrics(self):
        return []
'''


def parameters(folder: Path) -> set[tuple[str, int]]:
    """(layers removed, parameters) of every score in the store."""
    manifests = [json.loads(file.read_text()) for file in (folder / "store" / "score").glob("*/manifest.json")]
    return {(str(m["inputs"]["removed"]), m["output"]["params"]) for m in manifests}


def test_vllm_answers_for_dense_and_pruned_checkpoints(alone, fork_server, tmp_path):
    """With a stand-in for vLLM that answers with transformers: the same answers, and no export is left."""
    (tmp_path / "vllm").mkdir()  # found where the command is given
    (tmp_path / "vllm" / "__init__.py").write_text(textwrap.dedent(FAKE))
    run = fork_server.start(*COMMON, "evaluator=vllm", cwd=tmp_path)
    assert fork_server.wait(run) == 0, fork_server.log(run)
    ours, theirs = stored(alone), stored(tmp_path)
    assert {key: found[1] for key, found in theirs.items()} == {key: found[1] for key, found in ours.items()}
    assert parameters(tmp_path) == parameters(alone)
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_vllm_that_is_not_installed_is_named():
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=["evaluator=vllm"])
    with pytest.raises(SvlError, match=r"evaluator=vllm needs vLLM \(pip install vllm\) and a GPU"):
        config.validate_config(cfg)
    with pytest.raises(SvlError, match="evaluator=vllm needs vLLM"):
        vllm_answerer("x", 1, {})
    cfg.benchmark.likelihood = True
    with pytest.raises(SvlError, match="likelihood=true: only evaluator=transformers"):
        config.validate_config(cfg)


def test_perplexities_with_vllm_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["benchmark=prose", "evaluator=vllm", "tracker=none", f"paths.store={tmp_path}/store"]
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=words)
    with pytest.raises(SvlError, match=r"asks for perplexity .*, but evaluator=vllm gives only"):
        RunSetup(cfg)
    (section,) = [each for each in examine(cfg) if each.title.startswith("benchmark")]
    assert "evaluator=vllm gives only" in section.findings[0].text


def test_vllm_is_given_the_pictures_that_other_evaluators_are(checkpoint, tmp_path, monkeypatch):
    """It reads checkpoints: with other settings of the image processor, the dense one is exported, too."""
    seen = []

    def stand_in(path, batch_size, options, template=None):
        seen.append(AutoProcessor.from_pretrained(path).image_processor.to_dict())
        answerer = Answerer([svl.load(path, device="cpu", name=str(path))], batch_size, "")
        answerer.close = lambda: None  # as vLLM's has it
        return answerer

    (tmp_path / "lib" / "vllm").mkdir(parents=True)
    (tmp_path / "lib" / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setattr("svl.evaluation.vllm.vllm_answerer", stand_in)
    settings = "model.image_processor={image_processor_type: LlavaImageProcessor, do_pad: true}"
    run_svl(
        f"model.path={checkpoint('llava')}", settings, "calibration=demo", "calibration.samples=2", "n_remove=1",
        "benchmark=smoke", "benchmark.limit=1", "tracker=none", "evaluator=vllm", "paths.store=store",
        "paths.outputs=out", cwd=tmp_path,
    )  # fmt: skip
    assert len(seen) >= 2
    assert {(each["image_processor_type"], each["do_pad"]) for each in seen} == {("LlavaImageProcessor", True)}
