"""The public benchmarks, through lmms-eval's own task code, on stand-ins with the real columns."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra import compose, initialize_config_dir

from svl import benchmarks, config, results
from svl.core import Plan, SvlError
from svl.store import Entry
from svl.tasks import utils

pytest.importorskip("lmms_eval")
evaluation = importlib.import_module("svl.evaluate")
config.register()

ROOT = Path(__file__).parents[1]
OPPOSITE = {"yes": "no", "no": "yes", "A": "B", "B": "C", "C": "D", "D": "A"}
GARBAGE = ["Dog Apple Cat Big", "nothing about snow", "a dog", "", "!!!!!!", "I cannot say; Both are There"]


def choices(doc: dict[str, Any]) -> str:
    return "ABCD"[doc["correct_choice_idx"]]


# What a model that knows everything says.
ORACLES = {
    "aokvqa": choices,
    "scienceqa": lambda doc: "ABCD"[doc["answer"]],
    "mme": lambda doc: doc["answer"],
    "pope": lambda doc: doc["answer"],
    "mmbench": lambda doc: doc["answer"],
    "seedbench": lambda doc: doc["answer"],
    "gqa": lambda doc: doc["answer"],
    "textvqa": lambda doc: doc["answers"][0],
    "vizwiz": lambda doc: doc["answers"][0],
    "mmmu": lambda doc: doc["answer"],
    "realworldqa": lambda doc: doc["answer"],
    "mmstar": lambda doc: doc["answer"],
    "ai2d": lambda doc: "ABCD"[int(doc["answer"])],
    "chartqa": lambda doc: doc["answer"],
    "docvqa": lambda doc: doc["answers"][-1],
}


@cache
def benchmark(name: str) -> Any:
    """The composed configuration of conf/benchmark/<name>.yaml."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", overrides=[f"benchmark={name}"]).benchmark


@pytest.fixture(scope="session")
def standins(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("make_standins", ROOT / "scripts" / "make_standins.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(tmp_path_factory.mktemp("standins"))


@pytest.fixture
def run(llava, standins, tmp_path, monkeypatch):
    """Evaluate one benchmark with answers made by a function of the document -> (result, rows of samples.jsonl)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(standins / "cache"))

    def call(name: str, answer: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        def answers(self, requests, cap):
            docs = [self.task_dict[r.args[-2]][r.args[-1]][r.args[-3]] for r in requests]
            for request in requests:
                images = evaluation._images(self._conversation(request))
                assert images
                assert all(image.mode == "RGB" for image in images)
            return [(answer(doc),) for doc in docs]  # of one model

        monkeypatch.setattr(evaluation.Answerer, "_batch", answers)
        ((task, chosen),) = benchmark(name).tasks.items()
        settings = {"include_path": None, "data": str(standins), "limit": None, "batch_size": 4, **options}
        settings = {"metric": chosen.metric, "style": chosen.style, "max_new_tokens": None, **settings}
        result = evaluation.evaluate(llava, task, folder=tmp_path, **settings)
        return result, [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    return call


def main(result: dict[str, Any]) -> float:
    return result["metrics"][result["metric"]]["value"]


# ------------------------------------------------------------------------------------------ every benchmark


def test_every_benchmark_is_covered():
    assert set(benchmark("all").tasks) == {task for name in ORACLES for task in benchmark(name).tasks}
    assert set(benchmarks.tasks(benchmarks.OWN)) == set(benchmark("all").tasks)


@pytest.mark.parametrize("name", ORACLES)
def test_oracle_scores_all_its_opposite_and_garbage_nothing(name, run):
    chosen = benchmark(name)
    (settings,) = chosen.tasks.values()
    result, rows = run(name, ORACLES[name])
    best = 1 if name != "mme" else 400  # two categories of perception; 2000 with all ten
    assert main(result) == pytest.approx(best)
    assert result["higher_is_better"] == settings.higher_is_better
    assert result["max_new_tokens"] <= settings.max_new_tokens <= 32
    assert result["n"] == len(rows)
    assert all(row["score"] in (1, None) for row in rows)  # None: not of the main metric
    assert result["prompt"]["style"] == "default"
    assert "user " in result["prompt"]["first"]  # the chat template of the model
    upstream = [v["value"] for k, v in result["metrics"].items() if k.startswith(benchmarks.UPSTREAM)]
    assert bool(upstream) == (name in ("pope", "mme", "mmbench", "seedbench", "mmmu", "realworldqa", "mmstar"))
    if name != "pope":  # whose ratio of answers is none of labels
        assert {v for v in upstream if v is not None} <= {1, 100, 400}

    def wrong(doc):
        answer = ORACLES[name](doc)
        return OPPOSITE.get(answer, OPPOSITE.get(answer.lower(), "nothing"))

    result, rows = run(name, wrong)
    assert main(result) == 0
    assert not any(row["score"] for row in rows)

    chance = random.Random(0)
    result, rows = run(name, lambda doc: chance.choice(GARBAGE))
    assert main(result) == 0
    assert not any(row["score"] for row in rows)


@pytest.mark.parametrize("name", ORACLES)
def test_every_benchmark_has_errors_and_a_paired_comparison(name, run, tmp_path):
    """Half the answers right, and two thirds: the main metric and the retained share have standard errors."""

    def some(share):
        chance = random.Random(1)

        def answer(doc):
            right = chance.random() < share
            if name == "mmbench":  # two of its three questions, in every rotation
                right = utils.mmbench_question(doc) % 3 != (share > 0.6)
            return ORACLES[name](doc) if right else "???"

        return answer

    entries = []
    for share in (0.5, 0.7):
        result, _ = run(name, some(share))
        folder = tmp_path / str(share)
        folder.mkdir()
        (tmp_path / "samples.jsonl").rename(folder / "samples.jsonl")
        entries.append(Entry(folder, {"output": result}))
        known = [m for m, v in result["metrics"].items() if v["value"] is not None and v["stderr"] is not None]
        assert result["metric"] in known
        assert result["metrics"][result["metric"]]["stderr"] > 0
    (chosen,) = benchmark(name).tasks.values()
    summary = results.summarise({name: entries[0]}, {name: entries[1]}, {name: chosen.scale})
    assert 0 < summary["retained"]["value"] < 1.5
    assert summary["retained"]["stderr"] > 0
    change = summary["scores"][name]["change"]
    assert 0 < change["agreement"] <= 1
    assert change["p"] == results.mcnemar(change["gained"], change["lost"])


# ---------------------------------------------------------------------------------------------- corrections


def test_a_limit_takes_whole_pairs_and_rotations_and_never_leaks(run):
    _, every = run("mme", ORACLES["mme"])
    result, rows = run("mme", ORACLES["mme"], limit=3)
    assert (result["n"], result["limit"]) == (6, 3)
    assert [row["doc_id"] for row in rows] == [0, 1, 2, 8, 9, 10]  # rows of the data, not of the selection
    assert all(row == {**every[row["doc_id"]], "part": row["part"]} for row in rows)
    assert set(Counter(row["unit"] for row in rows).values()) == {2}
    result, rows = run("mmbench", ORACLES["mmbench"], limit=1)
    assert (result["n"], main(result)) == (4, 1)
    for share, n in ((0.5, 4), (0.2, 2)):
        assert [run(name, ORACLES[name], limit=share)[0]["n"] for name in ("gqa", "ai2d")] == [n, [3, 2][n == 2]]
    assert run("gqa", ORACLES["gqa"], limit=99)[0]["n"] == 8


def test_pope_counts_what_was_answered(run):
    said = {"yes": "Yes.", "no": "yes, there is"}
    result, _ = run("pope", lambda doc: said[doc["answer"]])
    found = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert (found["accuracy"], found["recall"], found["precision"], found["yes_ratio"]) == (0.5, 1, 0.5, 1)
    assert found["f1"] == pytest.approx(2 / 3) == found["f1_splits"]
    assert (found["upstream_pope_accuracy"], found["upstream_pope_yes_ratio"]) == (0, 0.5)  # of labels
    result, _ = run("pope", lambda doc: "yes" if doc["question_id"] == "1" else "maybe")
    found = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert found["recall"] == pytest.approx(1 / 6)  # unreadable answers are misses
    assert found["upstream_pope_recall"] == 1


def test_no_letter_is_drawn_or_dug_out_of_words(run):
    for name, upstream in (("mmmu", "mmmu_acc"), ("realworldqa", "exact_match"), ("seedbench", "seed_image")):
        words = {"A": "Ape", "B": "Bee", "C": "Cow", "D": "Dog"}
        result, _ = run(name, lambda doc, words=words: words.get(doc["answer"], "?"))
        assert main(result) == 0
        assert result["metrics"][f"upstream_{upstream}"]["value"] > 0
        assert run(name, lambda doc, words=words: words.get(doc["answer"], "?"))[0]["metrics"] == result["metrics"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(t, "B") for t in ("B", "b.", "(B)", "B. green", "The answer is B.", "Answer: (B)", "green", "Green.")],
        *[(t, None) for t in ("Big", "", "E", "A or B? The answer is A, no, the answer is B", "A red car", "gre")],
    ],
)
def test_reading_choices(text, letter):
    options = {"A": "red", "B": "green", "C": "blue", "D": "red", "F": None}
    assert utils.read_choice(text, options) == letter
    assert utils.read_choice("red", options) is None  # two options


def test_parts_sum_up_to_their_metric():
    chance = random.Random(0)
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    questions = [(c, f"{i}") for c, n in (("OCR", 2), ("count", 7), ("scene", 30)) for i in range(n) for _ in "ab"]
    items = [{"score": float(chance.random() < 0.6), "category": c, "pair": i} for c, i in questions]
    upstream = mme_aggregate_results([{**item, "question_id": item["pair"]} for item in items])
    assert utils.mme_score(items) == pytest.approx(upstream)
    answers = [
        {"answer": chance.choice(["yes", "no", None]), "target": chance.choice(["yes", "no"])} for _ in range(60)
    ]
    assert sum(utils.f1_parts(answers)) == pytest.approx(utils.f1(answers))
    spread = results.spread(utils.f1_parts(answers), range(60), [None] * 60)
    assert spread == pytest.approx(evaluation._bootstrap(utils.f1(answers), answers, utils.f1), rel=0.15)
    rotations = [{"question": i // 4, "score": float(chance.random() < 0.9)} for i in range(40)]
    right = [all(r["score"] for r in rotations[i : i + 4]) for i in range(0, 40, 4)]
    assert utils.mmbench_accuracy(rotations) == pytest.approx(statistics.fmean(right))
    spread = results.spread(utils.mmbench_parts(rotations), [r["question"] for r in rotations], [None] * 40)
    assert spread == pytest.approx(statistics.stdev(map(float, right)) / 10**0.5)


def test_likelihoods(llava, tmp_path, monkeypatch):
    """A multiple-choice task by likelihood: the choice of a plain forward pass over each question, one by one."""
    import torch

    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [
        {"q": f"what is {word} there", "options": ["red", "green blue", "round"], "gold": i % 3}
        for i, word in enumerate(["left", "right of the gray square", "in"])
    ]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "likely.yaml").write_text(
        "task: likely\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: gold\n"
        "doc_to_visual: !function see.picture\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (tmp_path / "see.py").write_text(
        "from PIL import Image\n"
        "def picture(doc):\n    return [Image.new('RGB', (16, 16), (200, 30, 9 * len(doc['q'])))]\n"
    )
    options = {"include_path": str(tmp_path), "metric": "acc", "limit": None, "max_new_tokens": None}
    found = {}
    for size in (1, 8):
        found[size] = evaluation.evaluate(llava, "likely", folder=tmp_path, batch_size=size, **options)
        rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        found[size] = (found[size]["metrics"], [row["prediction"] for row in rows])
    assert found[1] == found[8]

    from PIL import Image

    for document, prediction in zip(documents, found[1][1], strict=True):
        image = Image.new("RGB", (16, 16), (200, 30, 9 * len(document["q"])))
        prompt, losses = llava.prompt(document["q"], image=True), []
        for option in document["options"]:
            inputs, n = llava.encode([f"{prompt} {option}"], [[image]]), len(option.split())
            with torch.inference_mode():
                predicted = llava.model(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
            losses.append(-sum(predicted[k, inputs["input_ids"][0, k - n]].item() for k in range(n)))
        assert prediction == document["options"][losses.index(min(losses))]
    truth = [document["options"][document["gold"]] for document in documents]
    right = [float(a == b) for a, b in zip(truth, found[1][1], strict=True)]
    assert found[1][0]["acc"]["value"] == pytest.approx(statistics.fmean(right))


def test_one_likelihood_each(llava, tmp_path, monkeypatch):
    """Tasks of type `loglikelihood`: how likely the target is, and whether greedy decoding would give it."""
    import torch

    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["red", "green blue", "round", "left"]
    documents = [{"q": f"what is {word} there", "a": word} for word in words]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "likely.yaml").write_text(
        "task: likely\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: !function see.target\n"
        "doc_to_visual: !function see.picture\n"
        "metric_list:\n  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (tmp_path / "see.py").write_text(
        "from PIL import Image\n"
        "def picture(doc):\n    return [Image.new('RGB', (16, 16), (200, 30, 9 * len(doc['q'])))]\n"
        "def target(doc):\n    return doc['a']\n"
    )
    result = evaluation.evaluate(
        llava, "likely", folder=tmp_path, batch_size=3, include_path=str(tmp_path), metric="acc", limit=None,
        max_new_tokens=None,
    )  # fmt: skip

    from PIL import Image

    losses, greedy = [], []
    for document in documents:
        image = Image.new("RGB", (16, 16), (200, 30, 9 * len(document["q"])))
        prompt, n = llava.prompt(document["q"], image=True), len(document["a"].split())
        inputs = llava.encode([f"{prompt} {document['a']}"], [[image]])
        with torch.inference_mode():
            predicted = llava.model(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
        target = inputs["input_ids"][0, -n:]
        losses.append(-predicted.gather(1, target[:, None]).sum().item())
        greedy.append(float((predicted.argmax(-1) == target).all()))
    assert result["metrics"]["acc"]["value"] == statistics.fmean(greedy)
    # lmms-eval's "perplexity" is exp(-mean) of what it takes for a log-likelihood, and gets a loss
    assert abs(math.log(result["metrics"]["perplexity"]["value"])) == pytest.approx(statistics.fmean(losses), rel=1e-4)


# --------------------------------------------------------------------------------------------------- data


def test_copies_of_data_sets_in_either_form(run, standins, tmp_path):
    saved = datasets.load_dataset(str(standins / "POPE"), cache_dir=str(tmp_path / "cache"))
    saved.save_to_disk(str(tmp_path / "copies" / "POPE"))
    result, rows = run("pope", ORACLES["pope"], data=str(tmp_path / "copies"))
    assert (main(result), len(rows)) == (1, 12)
    with pytest.raises(SvlError, match=r"benchmark.data: .* has no folder 'MME', a copy of the data set"):
        run("mme", ORACLES["mme"], data=str(tmp_path / "copies"))


def test_keys_follow_the_copy(standins, tmp_path):
    copy = tmp_path / "POPE" / "data"
    copy.mkdir(parents=True)
    (copy / "test.parquet").write_bytes(b"one")
    prints = [benchmarks.fingerprint("svl_pope", None, data) for data in (None, str(standins), str(tmp_path))]
    (copy / "test.parquet").write_bytes(b"two")
    prints.append(benchmarks.fingerprint("svl_pope", None, str(tmp_path)))
    assert len(set(prints)) == 4


def test_metrics_and_styles_are_checked_before_anything_is_loaded():
    benchmarks.check_metric("svl_pope", "upstream_pope_f1_score", None)
    benchmarks.check_metric("svl_scienceqa", "exact_match", None)
    benchmarks.check_style("svl_scienceqa", "qwen_vl", None)
    with pytest.raises(SvlError, match="did you mean 'f1'"):
        benchmarks.check_metric("svl_pope", "f2", None)
    with pytest.raises(SvlError, match="did you mean 'qwen_vl'"):
        benchmarks.check_style("svl_scienceqa", "qwen-vl", None)


def test_any_task_of_lmms_eval_can_be_named_as_the_page_says():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    (words,) = re.findall(r"`(benchmark=none '\+benchmark\.tasks=.*')`", page)
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=shlex.split(words))
    config.validate(cfg)
    ((task, chosen),) = cfg.benchmark.tasks.items()
    benchmarks.check_metric(task, chosen.metric, None)


def test_the_papers_average():
    tasks = benchmark("paper6").tasks
    assert list(tasks) == [f"svl_{n}" for n in ("aokvqa", "scienceqa", "mme", "pope", "mmbench", "seedbench")]
    dense = dict(zip(tasks, (0.779, 0.656, 1246.4, 0.848, 0.643, 0.654), strict=True))
    average = results._mean(list(dense.values()), {task: tasks[task].scale for task in tasks})
    assert 100 * average == pytest.approx(70.1, abs=0.05)  # the published row of LLaVA-1.5-7B


# ----------------------------------------------------------------------------------------------- comparing


def scored(folder: Path, rows: list[dict[str, Any]], value: float) -> Entry:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = {"accuracy": {"value": value, "stderr": 0.1}}
    output = {"metric": "accuracy", "n": len(rows), "metrics": metrics, "limit": None}
    return Entry(folder, {"output": output})


def answers(scores: list[float], words: str = "ab") -> list[dict[str, Any]]:
    return [
        {"doc_id": i, "question": f"q|{i}\n<x>", "target": "t", "prediction": words[int(s)], "score": s}
        for i, s in enumerate(scores)
    ]


def test_two_models_are_compared_sample_by_sample(tmp_path):
    chance = random.Random(1)
    dense = [float(chance.random() < 0.8) for _ in range(400)]
    pruned = [s if chance.random() < 0.9 else 1 - s for s in dense]
    one = scored(tmp_path / "one", answers(pruned), statistics.fmean(pruned))
    other = scored(tmp_path / "other", answers(dense), statistics.fmean(dense))
    change = results.compare(one, other)
    assert change["gained"] == sum(a > b for a, b in zip(pruned, dense, strict=True))
    assert change["lost"] == sum(a < b for a, b in zip(pruned, dense, strict=True))
    assert change["agreement"] == 1 - (change["gained"] + change["lost"]) / 400
    assert change["p"] == results.mcnemar(change["lost"], change["gained"])
    share = statistics.fmean(pruned) / statistics.fmean(dense)
    resampled = []
    for _ in range(1000):
        chosen = chance.choices(range(400), k=400)
        resampled.append(sum(pruned[i] for i in chosen) / sum(dense[i] for i in chosen))
    paired = results.change_error(one, other, share) / statistics.fmean(dense)
    assert paired == pytest.approx(statistics.stdev(resampled), rel=0.15)
    retained = results.summarise({"t": one}, {"t": other}, {"t": 1.0})["retained"]
    assert retained == {"value": pytest.approx(share), "stderr": pytest.approx(paired)}

    page = results.flips({"t": (one, other)}, ("pruned", "dense"), most=3)
    assert f"right only in pruned: {change['gained']}, only in dense: {change['lost']}" in page
    assert page.count("q\\|") == 6
    assert f"and {change['lost'] - 3} more" in page
    assert "<x>" not in page
    assert all(line.count(" | ") == 4 for line in page.splitlines() if line.startswith("| ") and "q\\|" in line)


def test_mcnemar():
    assert results.mcnemar(0, 0) == results.mcnemar(5, 5) == 1
    assert results.mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert results.mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert 0 < results.mcnemar(900, 1200) < 1e-9


def test_failures_name_rows_of_the_data(llava, standins, tmp_path, monkeypatch):
    """Under a limit that takes pairs, lmms-eval's numbers are those of the selection."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(standins / "cache"))

    def fail(**inputs):
        raise IndexError("list index out of range")

    monkeypatch.setattr(llava.model, "generate", fail)
    options = {"include_path": None, "data": str(standins), "metric": "perception", "max_new_tokens": None}
    with pytest.raises(RuntimeError, match=r"task 'svl_mme': no answer to documents \[0, 1, 2, 8, 9, 10\]"):
        evaluation.evaluate(llava, "svl_mme", limit=3, batch_size=9, folder=tmp_path, **options)


def test_questions_outside_the_main_metric_do_not_count(tmp_path):
    rows = [*answers([1, 0, 1]), {"doc_id": 9, "question": "", "target": "", "prediction": "", "score": None}]
    one, other = scored(tmp_path / "one", rows, 2 / 3), scored(tmp_path / "other", answers([1, 1, 1]), 1.0)
    assert results.compare(one, other)["lost"] == 1
    assert results.change_error(one, other) == pytest.approx(1 / 3)


# --------------------------------------------------------------------------------------------- must hold


@pytest.fixture(scope="module")
def demo():
    import svl

    return svl.load(ROOT / "svl" / "demo" / "demo_lvlm", device="cpu")


def predictions(lvlm, folder: Path, task: str = "svl_demo_open", **options: Any) -> list[Any]:
    settings = {"include_path": str(ROOT / "svl" / "demo" / "tasks"), "metric": "accuracy", "limit": 40, **options}
    settings = {"batch_size": 8, "max_new_tokens": None, **settings}
    evaluation.evaluate(lvlm, task, folder=folder, **settings)
    return [json.loads(line)["prediction"] for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["svl_demo_existence", "svl_demo_choice", "svl_demo_open"])
def test_answers_are_the_same_twice_and_in_batches_of_any_size(task, demo, tmp_path):
    first = predictions(demo, tmp_path, task)
    assert first == predictions(demo, tmp_path, task) == predictions(demo, tmp_path, task, batch_size=1)
    assert len(set(first)) > 1


def test_pruning_in_place_never_gives_old_answers(demo, tmp_path):
    """Nothing between two evaluations of one model object remembers answers."""
    from svl import surgery

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


def command(folder: Path, *words: str, start: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run `svl` in a process of its own."""
    common = ["tracker=none", "strategy=manual", "strategy.layers=[3,9]", "selector=all", "compensation=none"]
    common += [f"paths.outputs={folder / 'out'}", f"paths.store={folder / 'store'}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    line = [sys.executable, *start, "-m", "svl", *common, *words]
    return subprocess.run(line, env=variables, capture_output=True, text=True, check=False, cwd=folder, timeout=500)


def stored(folder: Path) -> dict[tuple[Any, ...], Any]:
    """(task, layers removed) -> what does not depend on the clock of every score in the store, with its samples."""
    found = {}
    for file in (folder / "store" / "score").glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        output = {k: manifest["output"][k] for k in ("metrics", "n", "limit", "prompt")}
        key = (manifest["inputs"]["task"], tuple(manifest["inputs"]["removed"]))
        found[key] = (output, (file.parent / "samples.jsonl").read_text())
    return found


SAMPLE = ["benchmark=demo", "benchmark.limit=17", "benchmark.batch_size=4", "name=x"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = command(folder, *SAMPLE)
    assert done.returncode == 0, done.stderr
    assert len(stored(folder)) == 6
    return folder


def test_two_processes_give_what_one_gives(alone, tmp_path):
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for _ in range(2):  # the second time everything is stored: nothing to do together
        done = command(tmp_path, *SAMPLE, start=start)
        assert done.returncode == 0, done.stderr
        assert stored(tmp_path) == stored(alone)
    pages = [file.read_text() for file in (tmp_path / "out").rglob("flips.md")]
    assert len(pages) == 2  # of the first process only
    assert pages[0] == pages[1]
    assert "limit=17" in pages[0]


def test_tables_for_papers_refuse_limits(alone, tmp_path):
    from svl import report

    words = ["experiment=x", f"store={alone / 'store'}", f"out={tmp_path / 'report'}"]
    assert report.main(words) == 0
    assert "(limit=17)" in (tmp_path / "report" / "table.md").read_text()
    assert ",17," in (tmp_path / "report" / "results.csv").read_text()
    assert report.main([*words, f"paper={tmp_path / 'paper.csv'}"]) == 1
    assert not (tmp_path / "paper.csv").exists()


def test_a_failure_keeps_what_is_finished(tmp_path, monkeypatch):
    """The third benchmark fails; the first two stay, and the next run goes on with the third."""
    from svl import pipeline

    sample = ["tracker=none", "strategy=tail", "benchmark=demo", "benchmark.limit=4", f"paths.store={tmp_path}/store"]
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*sample, f"paths.outputs={tmp_path}/out", "ratio=0.125"])
    folder = tmp_path / "out"
    folder.mkdir()
    answer, broken = evaluation.Answerer.answer, [True]
    asked: list[str] = []

    def fail(self, conversations, cap):
        asked.append(self.describe.strip())
        if broken[0] and "open" in self.describe:
            raise IndexError("list index out of range")
        return answer(self, conversations, cap)

    monkeypatch.setattr(evaluation.Answerer, "answer", fail)
    with pytest.raises(RuntimeError, match=r"task 'svl_demo_open': no answer to documents \[0, 1, 2, 3\]: IndexError"):
        pipeline.run(cfg, folder)
    assert set(stored(tmp_path)) == {("svl_demo_existence", ()), ("svl_demo_choice", ())}
    broken[0] = False
    asked.clear()
    result = pipeline.run(cfg, folder)
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


def test_vllm_answers_for_dense_and_pruned_checkpoints(alone, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(textwrap.dedent(FAKE))
    served = command(
        tmp_path, *SAMPLE, "evaluator=vllm", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    assert served.returncode == 0, served.stderr
    ours, theirs = stored(alone), stored(tmp_path)
    assert {key: found[1] for key, found in theirs.items()} == {key: found[1] for key, found in ours.items()}
    assert not list((tmp_path / "store" / "tmp").iterdir())  # the export is gone


def test_vllm_that_is_not_installed_is_named(monkeypatch):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=["evaluator=vllm"])
    with pytest.raises(SvlError, match=r"evaluator=vllm needs vLLM \(pip install vllm\) and a GPU"):
        config.validate(cfg)
    with pytest.raises(SvlError, match="evaluator=vllm needs vLLM"):
        evaluation.served("x", 1, {})
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SvlError, match="without torchrun"):
        config.validate(cfg)


# ------------------------------------------------------------------------------------------------- models

FAMILY = {  # of conf/model: a tiny model of it in tests/families.py
    "llava_15_7b": "llava",
    "llava_15_13b": "llava",
    "llava_next_7b": "llava_next",
    "llava_onevision_7b": "llava_onevision",
    "qwen2_vl_7b": "qwen2_vl",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "qwen3_vl_8b": "qwen3_vl",
    "internvl3_8b": "internvl",
    "smolvlm2_2b": "smolvlm",
    "gemma3_4b": "gemma3",
    "paligemma2_3b": "paligemma2",
    "mplug_owl2": "mplug_owl2",
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_model_file_is_of_a_family_that_can_be_pruned(name):
    families = importlib.import_module("families")
    from svl.loading import find_anatomy
    from svl.prompts import STYLES

    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"model={name}", "benchmark=paper6", "benchmark.data=x"])
    config.validate(cfg)
    assert cfg.model.path.count("/") == 1
    assert cfg.model.prompt in STYLES
    family = families.FAMILIES[FAMILY[name]]()
    anatomy = find_anatomy(family.model)
    assert anatomy.removable
    kind = family.model.config.model_type.replace("_", "")
    assert kind.rstrip("3") in cfg.model.path.lower().replace("-", "").replace(".", "").replace("v16", "next")


def test_every_model_file_is_covered():
    own = {"demo_lvlm", "local", "smollm2_135m", "smol_lvlm", "qwen_vl_chat"}  # the last one: tests/test_qwen_vl.py
    assert {file.stem for file in (config.CONF / "model").glob("*.yaml")} == {*FAMILY, *own}


def test_prompt_styles(llava, qwen):
    from svl.prompts import STYLES, styled

    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    said = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    again = {"role": "user", "content": "Sure?"}
    vicuna = styled(llava, "vicuna_v1")
    assert vicuna.render([turn]) == f"{system} USER: <image>\nWhat is it? ASSISTANT:"
    expected = f"{system} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert vicuna.render([turn, said, again]) == expected
    assert styled(llava, "paligemma").render([turn]) == "<image>answer en What is it?"
    assert styled(llava, "plain").render([turn]) == "<image>\nWhat is it?\n"
    assert styled(llava, "chat").render([turn]) == llava.render([turn])
    assert llava.processor.chat_template not in STYLES.values()  # untouched
    with pytest.raises(SvlError, match=r"model\.prompt is 'vicuna'.*did you mean 'vicuna_v1'"):
        styled(llava, "vicuna")

    from PIL import Image

    small = styled(qwen, "chat", {"size": {"shortest_edge": 64, "longest_edge": 256}})
    image = Image.new("RGB", (64, 64))
    counts = [len(m.encode([m.prompt("is", image=True)], [[image]])["pixel_values"]) for m in (qwen, small)]
    assert counts[1] < counts[0]
    with pytest.raises(SvlError, match=r"has no setting 'sizes'.*did you mean 'size'"):
        styled(qwen, "chat", {"sizes": {}})
