"""Evaluation: the model as lmms-eval sees it, on the bundled benchmarks and on tasks of one's own."""

from __future__ import annotations

import base64
import copy
import importlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.tasks import DEMO, data_rows, score_task, script, task_folder
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from svl.core import SvlError
from svl.data.pictures import open_picture
from svl.evaluation.conversations import images_of
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm

pytest.importorskip("lmms_eval")
evaluation = importlib.import_module("svl.evaluation.evaluate")
Answerer = evaluation.Answerer
FILES = ("existence", "choice", "open")


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, Any]]]:
    return {name: data_rows(DEMO / "data" / f"{name}.parquet") for name in FILES}


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
        return score_task(model, task, tmp_path, **options)

    yield call
    torch.set_num_threads(threads)


def pixels(png: bytes) -> bytes:
    """The pixels of a PNG file."""
    return Image.open(io.BytesIO(png)).tobytes()


def asked(conversation: list[dict[str, Any]]) -> str:
    """The text of a conversation's first message."""
    return next(part["text"] for part in conversation[0]["content"] if part["type"] == "text")


def says(answer: str):
    """An `Answerer.answer` that gives the same answer to everything."""
    return lambda self, conversations, max_new_tokens: [(answer,)] * len(conversations)


@pytest.mark.parametrize("name", ["existence", "choice", "open"])
def test_oracle_scores_all_and_its_opposite_none(name, run, data, monkeypatch):
    truth = {(r["prompt"], pixels(r["image"]["bytes"])): r["answer"] for r in data[name]}
    opposite = {"yes": "no", "no": "yes", "A": "B", "B": "C", "C": "D", "D": "A"}

    def oracle(self, conversations, max_new_tokens):
        return [(truth[asked(c), c[0]["content"][0]["image"].tobytes()],) for c in conversations]

    def liar(*args):
        return [(opposite.get(answer, "nothing"),) for (answer,) in oracle(*args)]

    monkeypatch.setattr(Answerer, "answer", oracle)
    result, samples = run(f"svl_demo_{name}", batch_size=500)
    assert result["n"] == len(data[name]) == len(samples)
    for metric, found in result["metrics"].items():
        assert found["value"] == {"yes_ratio": 0.5, "off_format": 0}.get(metric, 1)
        assert (found["stderr"] > 0) == (metric == "yes_ratio")
    assert all(s["score"] == 1 and s["prediction"] == s["target"] for s in samples)

    monkeypatch.setattr(Answerer, "answer", liar)
    result, samples = run(f"svl_demo_{name}", batch_size=500)
    assert result["metrics"]["accuracy"]["value"] == 0
    assert not any(s["score"] for s in samples)


def test_on_accelerators_images_of_most_tokens_come_first(internvl, run, tmp_path, monkeypatch):
    """On the CPU, the longest texts do."""
    scoring = "process_results: !function utils.short_answer\n"
    rows = []
    for n, width in enumerate((64, 192, 128)):  # one tile; three or two with a thumbnail
        Image.new("RGB", (width, 64)).save(tmp_path / f"{width}.png")
        rows.append({"prompt": "a" * (n + 1), "answer": "red", "kind": "x", "image": str(tmp_path / f"{width}.png")})
    where = task_folder(tmp_path / "task", scoring + "doc_to_visual: !function shown.shown\n", rows)
    (tmp_path / "task" / "shown.py").write_text(
        "from PIL import Image\ndef shown(doc):\n    return [Image.open(doc['image'])]\n"
    )
    for accelerated, order in ((False, [128, 192, 64]), (True, [192, 128, 64])):
        seen = []

        def look(self, conversations, max_new_tokens, inputs=None, seen=seen):
            seen.extend(images_of(c)[0].width for c in conversations)
            return [("red",) for _ in conversations]

        monkeypatch.setattr(Answerer, "on_accelerator", accelerated)
        monkeypatch.setattr(Answerer, "answer", look)
        run("custom", internvl, include_path=where, batch_size=1)
        assert seen[1:] == order  # after the first for warming up


def test_answers_return_to_their_questions(run, monkeypatch):
    lengths = []

    def echo(self, conversations, max_new_tokens):
        lengths.extend(len(asked(c)) for c in conversations)
        return [(asked(c),) for c in conversations]

    monkeypatch.setattr(Answerer, "answer", echo)
    _, samples = run("svl_demo_open", limit=23, batch_size=4)
    lengths = lengths[4:]  # the first batch warmed up
    assert lengths == sorted(lengths, reverse=True)
    assert lengths != [len(s["question"]) for s in samples]
    assert [s["doc_id"] for s in samples] == list(range(23))
    assert all(s["prediction"] == s["question"] for s in samples)


def test_images_of_wrong_answers_are_kept(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "THUMBNAILS", 3)
    monkeypatch.setattr(evaluation, "THUMBNAIL", 32)
    monkeypatch.setattr(Answerer, "answer", says("yes"))
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
    monkeypatch.setattr(Answerer, "answer", says("no"))
    result, _ = run("svl_demo_existence", metric="precision")
    assert result["metrics"]["precision"] == dict.fromkeys(("value", "stderr", "low", "high"))
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


def test_failure_names_the_documents(run, lvlm, monkeypatch):
    calls = []

    def fail(**inputs):
        calls.append(inputs)
        raise IndexError("list index out of range")

    monkeypatch.setattr(lvlm.model, "generate", fail)
    with pytest.raises(SvlError, match=r"^task 'svl_demo_open': no answer to documents 0, 1 \(.*\): IndexError: list"):
        run("svl_demo_open", limit=2)
    assert len(calls) == 1


def test_out_of_memory_advises(run, lvlm, monkeypatch):
    def fail(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lvlm.model, "generate", fail)
    with pytest.raises(SvlError, match=r"task 'svl_demo_open' ran out of memory: lower benchmark.batch_size \(now 8\)"):
        run("svl_demo_open", limit=2)


def test_mistakes_are_explained(run, monkeypatch):
    monkeypatch.setattr(Answerer, "answer", lambda self, c, n: pytest.fail("asked nevertheless"))
    with pytest.raises(SvlError, match="did you mean 'svl_demo_existence'"):
        run("svl_demo_existance")
    with pytest.raises(
        SvlError, match=r"accuracy, precision, recall, f1, yes_ratio, above_chance, off_format .did you mean 'accuracy'"
    ):
        run("svl_demo_existence", metric="acuracy")
    with pytest.raises(SvlError, match="does not exist"):
        run("svl_demo_existence", include_path="nowhere")
    for limit in (0, 1.5, -1):
        with pytest.raises(SvlError, match=rf"limit is {limit}, but must be a whole number"):
            run("svl_demo_existence", limit=limit)
    with pytest.raises(SvlError, match=r"style is 'qwen'.*one of: default"):
        run("svl_demo_existence", style="qwen")


def test_stop_strings_only_where_the_task_names_them(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Answerer, "answer", says("red;\n\nblue"))
    documents = [{"prompt": "?", "answer": "red", "kind": "x"}] * 2
    scoring = "process_results: !function utils.short_answer\n"
    plain = task_folder(tmp_path / "a", scoring, documents)
    named = task_folder(tmp_path / "b", scoring + "generation_kwargs: {until: [';']}\n", documents)
    result, samples = run("custom", include_path=plain)
    assert result["max_new_tokens"] == 128
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
    monkeypatch.setattr(Answerer, "answer", says("red"))
    folder = task_folder(tmp_path / "c", "process_results: !function utils.short_answer\n", [{"prompt": "?"}])
    with pytest.raises(SvlError, match=r"task 'custom' cannot be scored: KeyError: 'answer'"):  # no retries
        run("custom", include_path=folder)
    (tmp_path / "c" / "data.json").unlink()
    with pytest.raises(SvlError, match=r"cannot load task 'custom': .*data\.json"):
        run("custom", include_path=folder)


# ------------------------------------------------------------------------------------------- what can go wrong


def picture_task(folder: Path, pictures: list[bytes], feature: Any = None) -> str:
    """A task of one's own with pictures in a column `image`: a struct of bytes and path, or of this feature."""
    task_folder(folder, "process_results: !function utils.short_answer\ndoc_to_visual: image\n", [])
    rows = [
        {"image": {"bytes": data, "path": None}, "prompt": "What color is it?", "answer": "red", "kind": "x"}
        for data in pictures
    ]
    table = datasets.Dataset.from_list(rows)
    if feature:
        table = table.cast_column("image", feature)
    table.to_parquet(folder / "data.parquet")
    text = (folder / "custom.yaml").read_text()
    (folder / "custom.yaml").write_text(text.replace("json\n", "parquet\n", 1).replace("data.json", "data.parquet"))
    return str(folder)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_pictures() -> list[bytes]:
    """16-bit grey, a colour hidden under alpha, and one that is turned by its EXIF orientation."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    hidden = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [encoded(Image.fromarray(ramp)), encoded(hidden), encoded(turned, "JPEG", exif=exif)]


@pytest.mark.parametrize("feature", [None, datasets.Image()], ids=["struct", "image"])
def test_pictures_are_read_as_everywhere(run, tmp_path, monkeypatch, feature):
    shown = []

    def look(self, conversations, max_new_tokens):
        shown.extend(c[0]["content"][0]["image"] for c in conversations)
        return [("blue",)] * len(conversations)

    monkeypatch.setattr(Answerer, "answer", look)
    pictures = odd_pictures()
    _, rows = run("custom", include_path=picture_task(tmp_path / "p", pictures, feature), batch_size=1)
    assert len(rows) == 3
    images = {(image.size, image.tobytes()) for image in shown}
    expected = [open_picture(data) for data in pictures]
    assert images == {(image.size, image.tobytes()) for image in expected}
    assert expected[0].getextrema()[0] == (0, 255)  # not all white
    assert expected[1].getpixel((0, 0)) == (255, 255, 255)
    assert expected[2].size == (64, 96)
    assert set(json.loads((tmp_path / "thumbnails.json").read_text())) == {"0", "1", "2"}


def test_a_picture_that_cannot_be_read_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Answerer, "answer", says("red"))
    folder = picture_task(tmp_path / "p", [encoded(Image.new("RGB", (64, 64))), b"no picture"])
    with pytest.raises(SvlError, match=r"^document 1 of task 'custom': cannot read the picture: it is none of PNG"):
        run("custom", include_path=folder)


def test_the_one_document_that_a_processor_refuses_is_named(run, lvlm, tmp_path, monkeypatch):
    encode = Lvlm.encode

    def refuse(self, texts, images=None, videos=None):
        if any("odd" in text for text in texts):
            raise ValueError("Image features and image tokens do not match: 4 and 5")
        return encode(self, texts, images, videos)

    monkeypatch.setattr(Lvlm, "encode", refuse)
    documents = [{"prompt": f"What is {word}?", "answer": "1", "kind": "x"} for word in ("red", "odd", "blue")]
    folder = task_folder(tmp_path / "o", "process_results: !function utils.short_answer\n", documents)
    message = r"^task 'custom': no answer to document 1: Image features .* 4 and 5; .*model\.image_token$"
    with pytest.raises(SvlError, match=message):
        run("custom", include_path=folder)


def test_text_of_data_and_models_reaches_the_terminal_harmless(run, tmp_path, monkeypatch, capsys):
    """Files keep it as it is: they are data."""
    answer, question = "red\x1b]0;owned\x07", "What\x1b[2J is it?"
    monkeypatch.setattr(Answerer, "answer", says(answer))
    documents = [{"prompt": question, "answer": "1", "kind": "x"}]
    folder = task_folder(tmp_path / "e", "process_results: !function talk.score\n", documents)
    Path(folder, "talk.py").write_text(
        "from svl.demo.tasks.utils import short_answer\n"
        "def score(doc, results):\n    print(doc['prompt'], results[0])\n    return short_answer(doc, results)\n"
    )
    _, rows = run("custom", include_path=folder)
    assert (rows[0]["question"], rows[0]["prediction"]) == (question, answer)
    out, err = capsys.readouterr()
    assert "\\x1b[2J is it? red\\x1b]0;owned\\x07" in err
    assert "\x1b" not in err.replace("\x1b[A", "")  # a progress bar's own
    assert not out


def test_examples_are_shown_in_texts(run, tmp_path, monkeypatch):
    """`num_fewshot` of a task without images: the prompt starts with the examples."""
    asked_texts = []

    def read(self, conversations, max_new_tokens):
        asked_texts.extend(asked(c) for c in conversations)
        return [("1",)] * len(conversations)

    monkeypatch.setattr(Answerer, "answer", read)
    documents = [{"prompt": f"question {i}:", "answer": f"answer{i}", "kind": "x"} for i in range(3)]
    body = "process_results: !function utils.short_answer\nnum_fewshot: 2\nfewshot_config: {sampler: default}\n"
    folder = task_folder(tmp_path / "f", body + "fewshot_split: test\n", documents)
    run("custom", include_path=folder)
    for text in set(asked_texts):
        own = text.rpartition("question")[2]
        assert text.count("question") == 3
        assert text.count("answer") == 2
        assert f"answer{own[1]}" not in text  # its own is not told
