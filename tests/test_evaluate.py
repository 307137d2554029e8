"""Evaluation: the bundled benchmarks, their scoring, and the model as lmms-eval sees it."""

from __future__ import annotations

import base64
import copy
import importlib
import importlib.util
import io
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from svl import benchmarks, results
from svl.core import SvlError
from svl.demo.tasks import utils
from svl.loading import Lvlm, find_anatomy

pytest.importorskip("lmms_eval")
evaluation = importlib.import_module("svl.evaluate")

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "svl" / "demo"
TASKS = str(DEMO / "tasks")
FILES = ("existence", "choice", "open", "calibration")


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, Any]]:
    """A data file's rows, images as PNG bytes."""
    table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    return table.cast_column("image", datasets.Image(decode=False)).to_list()


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, Any]]]:
    return {name: rows(DEMO / "data" / f"{name}.parquet") for name in FILES}


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    torch.manual_seed(0)
    demo = script("train_demo_lvlm")
    processor = demo.build_processor()
    model = demo.build_model(processor, layers=2, width=32).eval()
    model.set_attn_implementation("sdpa")
    return Lvlm(model, processor, find_anatomy(model), "tiny")


@pytest.fixture
def run(lvlm, tmp_path, monkeypatch):
    """`evaluate` with defaults -> (result, rows of samples.jsonl)."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(task: str, model: Lvlm = lvlm, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        defaults = {"include_path": TASKS, "metric": "accuracy", "limit": None, "batch_size": 8, "max_new_tokens": None}
        result = evaluation.evaluate(model, task, **{**defaults, **options}, folder=tmp_path)
        return result, [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    yield call
    torch.set_num_threads(threads)


def pixels(png: bytes) -> bytes:
    """The pixels of a PNG file."""
    return Image.open(io.BytesIO(png)).tobytes()


def asked(conversation: list[dict[str, Any]]) -> str:
    """The text of a conversation's first message."""
    return next(part["text"] for part in conversation[0]["content"] if part["type"] == "text")


def task_folder(folder: Path, body: str, documents: list[dict[str, Any]]) -> str:
    """A folder with a text-only task `custom` of our own scoring; `body` is appended to its YAML."""
    folder.mkdir()
    (folder / "data.json").write_text("\n".join(map(json.dumps, documents)))
    shutil.copy(DEMO / "tasks" / "utils.py", folder)
    (folder / "custom.yaml").write_text(
        "task: custom\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: prompt\ndoc_to_target: answer\n"
        "metric_list:\n  - {metric: accuracy, aggregation: !function utils.accuracy, higher_is_better: true}\n" + body
    )
    return str(folder)


# ------------------------------------------------------------------------------------------------- data


def test_benchmarks_are_balanced_and_large(data):
    assert sum(len(data[name]) for name in FILES[:3]) >= 1000
    assert Counter(r["answer"] for r in data["existence"]) == {"yes": 200, "no": 200}
    assert Counter(r["answer"] for r in data["choice"]) == dict.fromkeys("ABCD", 100)
    kinds = ("attribute", "count", "compare", "relation1", "relation2", "relation3")
    assert Counter(r["kind"] for r in data["open"]) == dict.fromkeys(kinds, 80)
    assert len(data["calibration"]) == 64
    for row in data["choice"]:
        assert len(row["options"]) == 4
        assert all(f"\n{letter}. {o}" in row["prompt"] for letter, o in zip("ABCD", row["options"], strict=True))
    assert sum((DEMO / "data" / f"{name}.parquet").stat().st_size for name in FILES) < 10 * 2**20


def test_no_scene_is_shared(data):
    images = [row["image"]["bytes"] for name in FILES for row in data[name]]
    assert len(set(images)) == len(images)


def test_data_are_what_the_script_makes(data):
    make = script("make_demo_data")
    for name, pairs in make.draw(0).items():
        assert {scene.split for scene, _ in pairs} == {"calibration" if name == "calibration" else "test"}
        table = make.table(name, pairs).cast_column("image", datasets.Image(decode=False))
        assert table.to_list() == data[name]


# ---------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *[(text, "yes") for text in ("yes", "Yes.", " yes, there is")],
        *[(text, "no") for text in ("NO!", "no", "No, a red one", '"no"')],
        *[(text, None) for text in ("", "yesterday", "not sure", "there is", "red", "</s>")],
    ],
)
def test_reading_yes_and_no(text, answer):
    assert utils.read_yes_no(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(text, "B") for text in ("B", "b", " B ", "B.", "(B)", "B. red", "B . red", "(B) red")],
        *[(text, None) for text in ("A red circle", "Both", "", "red", "?", "12")],
    ],
)
def test_reading_letters(text, letter):
    assert utils.read_letter(text) == letter


def test_pope_metrics_by_hand():
    # 4 positives: yes, yes, no, garbage; 4 negatives: no, yes, garbage, garbage
    said = ["Yes.", "yes, there is", "no", "blue", "No", "yes", "", "yesterday"]
    items = [
        utils.existence({"answer": target}, [text])["f1"]
        for text, target in zip(said, ["yes"] * 4 + ["no"] * 4, strict=True)
    ]
    assert utils.accuracy(items) == 3 / 8
    assert utils.precision(items) == 2 / 3
    assert utils.recall(items) == 2 / 4  # garbage is a miss
    assert utils.f1(items) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert utils.yes_ratio(items) == 3 / 8


def test_undefined_metrics_are_nan():
    never = [utils.existence({"answer": target}, ["no"])["f1"] for target in ("yes", "no")]
    assert math.isnan(utils.precision(never))
    assert (utils.recall(never), utils.f1(never), utils.yes_ratio(never)) == (0, 0, 0)
    assert math.isnan(utils.recall(never[1:]))
    assert math.isnan(utils.accuracy([]))


def test_choice_and_short_answers_by_hand():
    assert [utils.choice({"answer": "B"}, [t])["accuracy"]["score"] for t in ("(b)", "C", "red")] == [1, 0, 0]
    doc = {"answer": "red", "kind": "relation1"}
    scores = [utils.short_answer(doc, [t]) for t in ("Red.", " red ", "red circle", "")]
    assert [s["accuracy"]["score"] for s in scores] == [1, 1, 0, 0]
    assert all(s["accuracy_relation1"] == s["accuracy"] for s in scores)


def test_standard_errors():
    scores = [1.0, 0.0, 1.0, 1.0]

    def mean_error(values):
        return results.spread([v / len(values) for v in values], range(len(values)), [None] * len(values))

    assert mean_error(scores) == pytest.approx(statistics.stdev(scores) / 2)
    assert mean_error(scores[:1]) is None
    items = [{"score": s} for s in scores * 50]
    resampled = evaluation._bootstrap(0.75, items, utils.accuracy)
    assert resampled == evaluation._bootstrap(0.75, items, utils.accuracy)
    assert resampled == pytest.approx(mean_error(scores * 50), rel=0.15)
    assert evaluation._bootstrap(math.nan, items, utils.accuracy) is None
    # two questions on one image say no more than one does; a sum over strata has the errors of the strata
    doubled = results.spread([s / 8 for s in scores for _ in "ab"], [i for i in range(4) for _ in "ab"], [None] * 8)
    assert doubled == pytest.approx(mean_error(scores))
    split = results.spread([s / 4 for s in scores * 2], range(8), [i // 4 for i in range(8)])
    assert split == pytest.approx(math.sqrt(2) * mean_error(scores))


# ------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("name", ["existence", "choice", "open"])
def test_oracle_scores_all_and_its_opposite_none(name, run, data, monkeypatch):
    truth = {(r["prompt"], pixels(r["image"]["bytes"])): r["answer"] for r in data[name]}
    opposite = {"yes": "no", "no": "yes", "A": "B", "B": "C", "C": "D", "D": "A"}

    def oracle(self, conversations, max_new_tokens):
        return [(truth[asked(c), c[0]["content"][0]["image"].tobytes()],) for c in conversations]

    def liar(*args):
        return [(opposite.get(answer, "nothing"),) for (answer,) in oracle(*args)]

    monkeypatch.setattr(evaluation.Answerer, "answer", oracle)
    result, samples = run(f"svl_demo_{name}", batch_size=500)
    assert result["n"] == len(data[name]) == len(samples)
    for metric, found in result["metrics"].items():
        assert found["value"] == (0.5 if metric == "yes_ratio" else 1)
        assert (found["stderr"] > 0) == (metric == "yes_ratio")
    assert all(s["score"] == 1 and s["prediction"] == s["target"] for s in samples)

    monkeypatch.setattr(evaluation.Answerer, "answer", liar)
    result, samples = run(f"svl_demo_{name}", batch_size=500)
    assert result["metrics"]["accuracy"]["value"] == 0
    assert not any(s["score"] for s in samples)


def test_answers_return_to_their_questions(run, monkeypatch):
    lengths = []

    def echo(self, conversations, max_new_tokens):
        lengths.extend(len(asked(c)) for c in conversations)
        return [(asked(c),) for c in conversations]

    monkeypatch.setattr(evaluation.Answerer, "answer", echo)
    _, samples = run("svl_demo_open", limit=23, batch_size=4)
    lengths = lengths[4:]  # the first batch warmed up
    assert lengths == sorted(lengths, reverse=True)
    assert lengths != [len(s["question"]) for s in samples]
    assert [s["doc_id"] for s in samples] == list(range(23))
    assert all(s["prediction"] == s["question"] for s in samples)


def test_images_of_wrong_answers_are_kept(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "THUMBNAILS", 3)
    monkeypatch.setattr(evaluation, "THUMBNAIL", 32)
    monkeypatch.setattr(evaluation.Answerer, "answer", lambda _, asked, n: [("yes",)] * len(asked))
    _, rows = run("svl_demo_existence", limit=20)
    kept = json.loads((tmp_path / "thumbnails.json").read_text())
    assert list(kept) == [str(row["doc_id"]) for row in rows if row["score"] == 0][:3]
    for number, uri in kept.items():
        head, _, body = uri.partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(body))) as small:
            source = Image.open(io.BytesIO(data["existence"][int(number)]["image"]["bytes"])).convert("RGB")
            assert max(small.size) == 32
            pair = [np.asarray(image.convert("RGB").resize((8, 8)), float) for image in (small, source)]
            assert np.abs(pair[0] - pair[1]).mean() < 10  # of 255: it is that document's image


def test_model_survives_and_batches_do_not_matter(run, lvlm):
    weights = {name: w.clone() for name, w in lvlm.model.state_dict().items()}
    settings = lvlm.model.generation_config.to_dict()
    generator = torch.get_rng_state()
    first, alone = run("svl_demo_open", limit=24, batch_size=1)
    second, together = run("svl_demo_open", limit=24, batch_size=8)
    third, again = run("svl_demo_open", limit=24, batch_size=8)
    assert alone == together == again
    assert len({s["prediction"] for s in alone}) > 1
    assert first["metrics"] == second["metrics"] == third["metrics"]
    assert (first["n"], first["limit"], first["max_new_tokens"]) == (24, 24, 4)
    assert all(torch.equal(w, weights[name]) for name, w in lvlm.model.state_dict().items())
    assert lvlm.model.generation_config.to_dict() == settings
    assert not lvlm.model.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_undefined_metric_is_null(run, monkeypatch):
    monkeypatch.setattr(evaluation.Answerer, "answer", lambda self, c, n: [("no",)] * len(c))
    result, _ = run("svl_demo_existence", metric="precision")
    assert result["metrics"]["precision"] == {"value": None, "stderr": None}
    assert result["metrics"]["recall"]["value"] == 0
    assert result["metrics"]["accuracy"]["value"] == 0.5
    assert "NaN" not in json.dumps(result)


def test_endless_answers_are_capped(run, lvlm, monkeypatch):
    monkeypatch.setattr(lvlm.model.generation_config, "eos_token_id", None)
    lengths = []
    generate = lvlm.model.generate

    def measure(**inputs):
        prompts = inputs["input_ids"]
        assert (prompts == lvlm.tokenizer.bos_token_id).sum(1).tolist() == [1] * len(prompts)
        assert (prompts[:, -1] != lvlm.tokenizer.pad_token_id).all()
        tokens = generate(**inputs)
        lengths.append(tokens.shape[1] - prompts.shape[1])
        return tokens

    monkeypatch.setattr(lvlm.model, "generate", measure)
    assert run("svl_demo_choice", limit=8)[0]["max_new_tokens"] == 4
    assert run("svl_demo_choice", limit=8, max_new_tokens=7)[0]["max_new_tokens"] == 7
    assert lengths == [2, 4, 2, 7]  # each after its warm-up


def test_failure_names_the_document(run, lvlm, monkeypatch):
    calls = []

    def fail(**inputs):
        calls.append(inputs)
        raise IndexError("list index out of range")

    monkeypatch.setattr(lvlm.model, "generate", fail)
    with pytest.raises(RuntimeError, match=r"task 'svl_demo_open': no answer to documents \[0, 1\]: IndexError: list"):
        run("svl_demo_open", limit=2)
    assert len(calls) == 1


def test_out_of_memory_advises(run, lvlm, monkeypatch):
    def fail(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lvlm.model, "generate", fail)
    with pytest.raises(SvlError, match="batch_size below 8"):
        run("svl_demo_open", limit=2)


def test_mistakes_are_explained(run, monkeypatch):
    monkeypatch.setattr(evaluation.Answerer, "answer", lambda self, c, n: pytest.fail("asked nevertheless"))
    with pytest.raises(SvlError, match="did you mean 'svl_demo_existence'"):
        run("svl_demo_existance")
    with pytest.raises(SvlError, match=r"accuracy, precision, recall, f1, yes_ratio .did you mean 'accuracy'"):
        run("svl_demo_existence", metric="acuracy")
    with pytest.raises(SvlError, match="does not exist"):
        run("svl_demo_existence", include_path="nowhere")
    for limit in (0, 1.5, -1):
        with pytest.raises(SvlError, match=rf"limit is {limit}, but must be a whole number"):
            run("svl_demo_existence", limit=limit)
    with pytest.raises(SvlError, match=r"style is 'qwen'.*one of: default"):
        run("svl_demo_existence", style="qwen")


def test_stop_strings_only_where_the_task_names_them(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.Answerer, "answer", lambda self, c, n: [("red;\n\nblue",)] * len(c))
    documents = [{"prompt": "?", "answer": "red", "kind": "x"}] * 2
    scoring = "process_results: !function utils.short_answer\n"
    plain = task_folder(tmp_path / "a", scoring, documents)
    named = task_folder(tmp_path / "b", scoring + "generation_kwargs: {until: [';']}\n", documents)
    result, samples = run("custom", include_path=plain)
    assert result["max_new_tokens"] == evaluation.NEW_TOKENS
    assert samples[0]["prediction"] == "red;\n\nblue"
    assert run("custom", include_path=named)[0]["metrics"]["accuracy"]["value"] == 1


def test_documents_with_different_numbers_of_images(run, tmp_path):
    documents = [{"prompt": f"What color is it? {n}", "answer": "red", "kind": "x", "n": n} for n in (1, 0, 2, 0, 1)]
    visual = "process_results: !function utils.short_answer\ndoc_to_visual: !function visual.images\n"
    folder = task_folder(tmp_path / "d", visual, documents)
    Path(folder, "visual.py").write_text(
        "from PIL import Image\ndef images(doc):\n    return [Image.new('L', (64, 64), 80)] * doc['n']\n"
    )
    _, alone = run("custom", include_path=folder, batch_size=1, max_new_tokens=3)
    _, together = run("custom", include_path=folder, batch_size=8, max_new_tokens=3)
    assert alone == together


def test_text_model(run, lvlm, tmp_path):
    tokenizer = copy.deepcopy(lvlm.tokenizer)
    tokenizer.chat_template = None
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval()
    reader = Lvlm(model, tokenizer, find_anatomy(model), "reader")
    with pytest.raises(SvlError, match="asks about images, but model 'reader' reads text only"):
        run("svl_demo_open", reader, limit=2)
    documents = [{"prompt": "How many red shapes are there? " * k, "answer": "1", "kind": "x"} for k in (1, 3, 2)]
    folder = task_folder(tmp_path / "text", "process_results: !function utils.short_answer\n", documents)
    _, alone = run("custom", reader, include_path=folder, batch_size=1, max_new_tokens=3)
    _, together = run("custom", reader, include_path=folder, batch_size=3, max_new_tokens=3)
    assert alone == together
    images = replace(lvlm, processor=copy.copy(lvlm.processor))
    images.processor.chat_template = None
    with pytest.raises(SvlError, match="no chat template"):
        run("svl_demo_open", images, limit=2)


def test_errors_of_a_task_are_not_retried(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.Answerer, "answer", lambda self, c, n: [("red",)] * len(c))
    folder = task_folder(tmp_path / "c", "process_results: !function utils.short_answer\n", [{"prompt": "?"}])
    with pytest.raises(KeyError, match="answer"):  # not tenacity's RetryError, eight seconds later
        run("custom", include_path=folder)
    (tmp_path / "c" / "data.json").unlink()
    with pytest.raises(SvlError, match="cannot load the data of task 'custom'"):
        run("custom", include_path=folder)


# -------------------------------------------------------------------------------------------- benchmarks


def test_fingerprint_follows_content(tmp_path):
    before = benchmarks.fingerprint("svl_demo_open", TASKS)
    shutil.copytree(DEMO, tmp_path / "demo")
    folder = tmp_path / "demo" / "tasks"
    seen = [benchmarks.fingerprint("svl_demo_open", str(folder))]
    assert seen == [before]  # wherever it lies
    for name in ("svl_demo_open.yaml", "_common.yaml", "utils.py", "../data/open.parquet"):
        with open(folder / name, "ab") as file:
            file.write(b"\n")
        seen.append(benchmarks.fingerprint("svl_demo_open", str(folder)))
    assert len(set(seen)) == 5
    (folder / "svl_demo_choice.yaml").write_text("task: other\n")
    assert benchmarks.fingerprint("svl_demo_open", str(folder)) == seen[-1]


def test_shipped_benchmarks_are_found():
    assert benchmarks.find("pope", None).name == "pope.yaml"
    assert benchmarks.fingerprint("pope", None) != benchmarks.fingerprint("mme", None)
    with pytest.raises(SvlError, match="did you mean 'scienceqa_img'"):
        benchmarks.fingerprint("sciencqa_img", None)


def test_benchmarks_are_cheap_to_import():
    code = "import sys, svl.benchmarks; assert not {'torch', 'lmms_eval', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metric_is_checked_from_the_yaml_alone():
    benchmarks.check_metric("svl_demo_existence", "f1", str(TASKS))
    with pytest.raises(SvlError, match=r"svl_demo_existence\.metric is 'f2'.*did you mean 'f1'"):
        benchmarks.check_metric("svl_demo_existence", "f2", str(TASKS))
