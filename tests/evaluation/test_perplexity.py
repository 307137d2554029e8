"""Losses on running text, against the model's own loss and by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import yaml

import svl
from svl.config import PACKAGE
from svl.core import SvlError
from svl.data.sample_files import read_samples
from svl.evaluation import benchmarks
from svl.evaluation.perplexity import METRICS, TextLoss, evaluate_perplexity, loss_metrics, metric_parts
from svl.evaluation.score_statistics import Part, standard_error
from svl.evaluation.settings import TaskOptions
from svl.report import flips_page
from svl.run import run_result
from svl.store.artifacts import Entry

TASKS = PACKAGE / "demo" / "tasks"


@pytest.fixture
def task(tmp_path):
    texts = ["the of and", "of", "and the of the of and of", "the the"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t + " the"}) for t in texts))
    config = {"task": "texts", "output_type": "perplexity", "dataset_path": "json"}
    config |= {"dataset_kwargs": {"data_files": "texts.jsonl"}, "metric_list": [{"metric": "loss"}]}
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def score(lvlm, folder, **options):
    chosen = TaskOptions(**{"metric": "loss", "batch_size": 3, "include_path": str(folder), **options})
    return evaluate_perplexity(lvlm, "texts", chosen, folder)


def test_no_token_is_known_before_it_is_predicted(mimic, task):
    """By a model that reads prompts both ways: the loss of a text is that of its beginnings' last tokens."""
    lvlm = svl.load(mimic("paligemma2_3b"), device="cpu", dtype="float32")
    total, n = 0.0, 0
    for example in read_samples(task / "texts.jsonl").samples:
        ids = lvlm.encode([example.prompt])["input_ids"]
        for k in range(1, ids.shape[1]):
            begin = {"input_ids": ids[:, :k], "attention_mask": torch.ones_like(ids[:, :k])}
            begin["token_type_ids"] = torch.ones_like(ids[:, :k])
            with torch.inference_mode():
                total -= float(lvlm.model(**begin).logits[0, -1].log_softmax(-1)[ids[0, k]])
        n += ids.shape[1] - 1
    for batch_size in (1, 3):
        found = score(lvlm, task, batch_size=batch_size)["metrics"]["loss"]["value"]
        assert found == pytest.approx(total / n, rel=1e-4)


def test_the_loss_is_the_models_own(llama, task):
    total, n, size = 0.0, 0, 0
    for example in read_samples(task / "texts.jsonl").samples:
        inputs = llama.encode([example.prompt])
        with torch.inference_mode():
            loss = float(llama.model(**inputs, labels=inputs["input_ids"]).loss)
        tokens = inputs["input_ids"].shape[1] - 1
        total, n = total + loss * tokens, n + tokens
        size += len(llama.tokenizer.decode(inputs["input_ids"][0, 1:]).encode())
    for batch_size in (1, 3):
        scores = score(llama, task, batch_size=batch_size)
        metrics = scores["metrics"]
        assert metrics["loss"]["value"] == pytest.approx(total / n, abs=1e-5)
        assert metrics["perplexity"]["value"] == pytest.approx(math.exp(total / n), rel=1e-4)
        assert metrics["bits_per_byte"]["value"] == pytest.approx(total / size / math.log(2), rel=1e-4)
        assert (scores["n"], scores["tokens"], scores["higher_is_better"]) == (4, n, False)
    samples = [json.loads(line) for line in (task / "samples.jsonl").read_text().splitlines()]
    assert sum(s["part"] for s in samples) == pytest.approx(total / n, abs=1e-5)


def test_its_error_is_that_of_a_ratio_of_sums(llama, task):
    """The delta method, against what leaving out one sample at a time does (jackknife)."""
    whole = score(llama, task)["metrics"]["loss"]
    samples = [json.loads(line) for line in (task / "samples.jsonl").read_text().splitlines()]
    sums = [s["part"] for s in samples]
    counts = [s["part"] / s["score"] for s in samples]
    left = [(sum(sums) - a) / (sum(counts) - c) for a, c in zip(sums, counts, strict=True)]
    mean = sum(left) / 4
    jackknife = math.sqrt(3 / 4 * sum((x - mean) ** 2 for x in left))
    assert whole["stderr"] == pytest.approx(jackknife, rel=0.6)
    assert whole["stderr"] > 0


@pytest.mark.parametrize("metric", METRICS)
def test_parts_of_a_metric_sum_up_to_it(metric):
    losses = [TextLoss(20.0, 10, 30), TextLoss(60.0, 20, 70), TextLoss(15.0, 5, 25)]
    parts, whole = metric_parts(losses, metric), loss_metrics(losses)[metric]
    assert sum(parts) == pytest.approx(whole["value"])
    # a little more loss of the second text, against its part of the change
    more = loss_metrics([losses[0], TextLoss(60.001, 20, 70), losses[2]])[metric]["value"] - whole["value"]
    wider = metric_parts([losses[0], TextLoss(60.001, 20, 70), losses[2]], metric)
    assert sum(wider) - sum(parts) == pytest.approx(more)
    if metric == "perplexity":
        error = standard_error(Part(part, i) for i, part in enumerate(parts))
        assert error == pytest.approx(whole["stderr"])


def test_a_perplexity_that_no_float_holds_is_undefined():
    """A loss of 760 nats is finite, its exponential is not."""
    losses = [TextLoss(8000.0, 10, 10), TextLoss(7200.0, 10, 10)]
    found = loss_metrics(losses)
    assert found["loss"]["value"] == 760
    assert found["perplexity"] == dict.fromkeys(("value", "stderr", "low", "high"))
    assert metric_parts(losses, "perplexity") == [None, None]
    assert metric_parts(losses, "loss") == [400, 360]


def test_limits_and_mistakes(llama, task):
    assert score(llama, task, limit=2)["n"] == score(llama, task, limit=0.5)["n"] == 2
    with pytest.raises(SvlError, match=r"metric of task 'texts' is 'lose'.*did you mean 'loss'"):
        score(llama, task, metric="lose")
    bos = llama.tokenizer.bos_token
    (task / "texts.jsonl").write_text(json.dumps({"text": bos or "the"}))
    with pytest.raises(SvlError, match="fewer than two tokens"):
        score(llama, task)


def test_a_loss_that_is_not_finite_is_undefined(llama, task):
    """The metrics are null, never a number, and so are the scores of the texts that have none."""
    word = llama.tokenizer.convert_tokens_to_ids("and")
    broken = replace(llama, model=copy.deepcopy(llama.model))
    broken.model.get_input_embeddings().weight.data[word] = math.inf
    assert score(broken, task)["metrics"] == {m: dict.fromkeys(("value", "stderr", "low", "high")) for m in METRICS}
    text = (task / "samples.jsonl").read_text()
    assert [json.loads(line)["score"] is None for line in text.splitlines()] == [True, False, True, False]
    assert "NaN" not in text


def test_what_a_model_refuses_is_named(llama, task, monkeypatch):
    def refuse(*args, **kwargs):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(llama.model, "forward", refuse)
    message = (
        r"^task 'texts': documents \[0, 1, 2\] do not go through the model: IndexError: index out of range in self$"
    )
    with pytest.raises(SvlError, match=message):
        score(llama, task)


def test_running_out_of_memory_says_what_to_turn_down(llama, task, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")

    monkeypatch.setattr(llama.model, "forward", fail)
    with pytest.raises(SvlError, match=r"'texts' ran out of memory.*: lower benchmark\.batch_size \(now 3\)$"):
        score(llama, task)


def test_losses_are_not_compared_as_right_and_wrong(tmp_path):
    entries = []
    for name, losses in (("pruned", [0.4, 2.0]), ("dense", [0.6, 0.3])):
        (tmp_path / name).mkdir()
        rows = [
            {"doc_id": i, "question": "q", "target": "", "prediction": "", "score": x} for i, x in enumerate(losses)
        ]
        (tmp_path / name / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
        output = {"metric": "loss", "n": 2, "metrics": {"loss": {"value": sum(losses) / 2, "stderr": 0.1}}}
        entries.append(Entry(tmp_path / name, {"output": {**output, "higher_is_better": False}}))
    found = run_result.summarise({"t": entries[0]}, {"t": entries[1]}, {"t": 1.0})
    assert found["scores"]["t"]["change"] is found["retained"] is None
    assert "## t" not in flips_page.flips_page({"t": tuple(entries)}, ("pruned", "dense"))


def test_bundled_prose_is_disjoint_and_plain():
    files = {
        name: read_samples(PACKAGE / "demo" / "text" / f"{name}.jsonl") for name in ("calibration", "fiction", "essays")
    }
    assert all(example.plain for data in files.values() for example in data.samples)
    sentences = {
        name: {s for e in data.samples for s in e.prompt.split(". ") if len(s) > 60} for name, data in files.items()
    }
    assert not sentences["calibration"] & (sentences["fiction"] | sentences["essays"])
    assert sum(f.stat().st_size for f in (PACKAGE / "demo" / "text").iterdir()) <= 500_000
    for name in ("fiction", "essays"):
        task = f"svl_prose_{name}"
        assert benchmarks.task_settings(task, str(TASKS))["output_type"] == "perplexity"
        benchmarks.check_metric(task, "perplexity", str(TASKS))
