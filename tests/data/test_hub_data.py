"""Samples drawn from data sets of the hub, from stand-ins with their columns, and from folders."""

from __future__ import annotations

import http.server
import importlib.util
import io
import socket
import threading

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers.paths import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from svl import config
from svl.core import SvlError
from svl.data import hub_data, samples
from svl.data.hub_data import HubSource, draw_samples
from svl.data.row_formats import DESCRIBE, RowOptions
from svl.data.sample_files import read_samples

config.register_with_hydra()


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "png")
    return file.getvalue()


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    """The library waits after every stream for reads from the network that are still going on: here, there are none."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("make_standins", ROOT / "scripts" / "make_standins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ["llava-instruct-mix-vsft", "coco_captions", "GQA", "ScienceQA", "A-OKVQA", "FineVision", "wikitext"]
    names.append("derek-thomas/ScienceQA")
    return module.write(tmp_path_factory.mktemp("standins"), names)


def chosen(choice, standins, **changes):
    """What conf/calibration/<choice>.yaml draws, from the copy of its data set."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        c = compose("config", overrides=[f"calibration={choice}"]).calibration
    rows = RowOptions(changes.pop("format", c.format), c.prompt or DESCRIBE, turns=c.turns)
    source = {"n": 5, "seed": 0, "name": c.name, "split": c.split, "image_table": dict(c.image_table) or None}
    copy = standins / c.path if (standins / c.path).is_dir() else standins / c.path.split("/")[1]
    return draw_samples(HubSource(str(copy), **(source | changes), options=rows))


WANTED = {  # part of the first turn, part of its answer
    "llava_instruct": ("What is in scene", "thing."),
    "coco_captions": ("one-sentence caption", "thing, number"),
    "gqa": ("Which colour does shape", ""),
    "scienceqa": ("\nAnswer with the option's letter", ""),
    "aokvqa": ("\nA. ", ""),
    "finevision": ("Describe", "It is"),
    "wikitext": ("is known for", ""),
}


@pytest.mark.parametrize("choice", WANTED)
def test_every_data_set_gives_samples(choice, standins, tmp_path):
    found = chosen(choice, standins)
    asked, said = WANTED[choice]
    for example in found.samples:
        assert asked in example.prompt
        assert said in example.answer
        assert example.plain == (choice == "wikitext")
        assert example.plain or example.pictures[0].size == (32, 24)
        assert example.plain or "<image>" not in example.prompt
    assert len({e.images for e in found.samples}) > 1 or choice == "wikitext"
    if choice in ("scienceqa", "aokvqa"):
        assert {e.answer for e in found.samples} <= set("ABCD")
    if choice == "wikitext":
        assert all(len(e.prompt) >= hub_data.CHARACTERS and "=" not in e.prompt for e in found.samples)
    assert chosen(choice, standins).fingerprint == found.fingerprint
    assert chosen(choice, standins, seed=1).fingerprint != found.fingerprint
    samples.write_samples(found, tmp_path / "kept.parquet")
    kept = read_samples(tmp_path / "kept.parquet")
    assert (kept.fingerprint, kept.answers) == (found.fingerprint, found.answers)


def test_images_of_gqa_belong_to_their_questions(standins):
    def rows(name):
        (file,) = (standins / "GQA" / name).iterdir()
        return pyarrow.parquet.read_table(file).to_pylist()

    images = {row["id"]: row["image"]["bytes"] for row in rows("train_balanced_images")}
    of = {row["question"]: images[row["imageId"]] for row in rows("train_balanced_instructions")}
    assert all((of[e.prompt],) == e.images for e in chosen("gqa", standins).samples)


def test_mistakes_with_data_sets_are_named(standins):
    with pytest.raises(SvlError, match=r"calibration.format is 'choice'.*did you mean 'choices'"):
        chosen("scienceqa", standins, format="choice")
    with pytest.raises(SvlError, match=r"calibration\.samples is not set"):
        chosen("scienceqa", standins, n=None)
    with pytest.raises(SvlError, match=r"has \d+ samples in 'train', but calibration.samples is 500"):
        chosen("scienceqa", standins, n=500)
    with pytest.raises(SvlError, match="there is no column 'caption'"):
        chosen("scienceqa", standins, format="caption")
    with pytest.raises(SvlError, match=r"calibration\.path: cannot read .*tran"):
        chosen("scienceqa", standins, split="tran")
    with pytest.raises(SvlError, match=r"calibration\.name is 'ScienceQA-IMGS'.*did you mean 'ScienceQA-IMG'"):
        draw_samples(HubSource(str(standins / "ScienceQA"), 5, name="ScienceQA-IMGS", options=RowOptions("choices")))


def test_a_split_that_is_commented_out_in_the_card_is_named(standins):
    """Its files are there: the card of lmms-lab/ScienceQA leaves out the training questions."""
    assert list((standins / "ScienceQA" / "ScienceQA-IMG").glob("train-*.parquet"))
    said = r"^calibration\.path: cannot read '.*': Bad split: train\. Available splits: \['validation', 'test'\]$"
    with pytest.raises(SvlError, match=said):
        draw_samples(HubSource(str(standins / "ScienceQA"), 5, name="ScienceQA-IMG", options=RowOptions("choices")))


def test_data_sets_are_named_by_owners_that_keep_them():
    """lmms-lab's have moved, and redirects of old names go away."""
    for file in (config.CONF / "calibration").glob("*.yaml"):
        assert not str(OmegaConf.to_container(OmegaConf.load(file))["path"]).startswith("lmms-lab/"), file


# --------------------------------------------------------------------------------------------- folders


def write_rows(file, *answers):
    """A table of pictures that are asked `prompt`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": png(i), "path": None} for i in range(len(answers))]
    table = {"image": pictures, "question": ["What?"] * len(answers), "answer": list(answers)}
    pyarrow.parquet.write_table(pyarrow.table(table), file)


def answers_of(folder, n=2, **changes):
    return {s.answer for s in draw_samples(HubSource(str(folder), n, options=RowOptions("question"), **changes))}


def write_card(folder, *configs):
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': list(configs)})}---\nA card.\n")


def test_without_a_card_splits_are_told_by_names(tmp_path):
    write_rows(tmp_path / "train-00000-of-00001.parquet", "a", "b")
    write_rows(tmp_path / "validation" / "0.parquet", "c", "d")
    write_rows(tmp_path / "more" / "test.parquet", "e", "f")
    assert answers_of(tmp_path) == {"a", "b"}
    assert answers_of(tmp_path, split="validation") == {"c", "d"}
    assert answers_of(tmp_path, split="test") == answers_of(tmp_path, name="more", split="test") == {"e", "f"}


def test_files_that_name_no_split_are_for_training(tmp_path):
    write_rows(tmp_path / "0.parquet", "a", "b")
    write_rows(tmp_path / ".hidden.parquet", "c")
    assert answers_of(tmp_path) == {"a", "b"}


def test_a_card_names_files_by_configuration_and_split(tmp_path):
    write_rows(tmp_path / "x" / "1.parquet", "a")
    write_rows(tmp_path / "x" / "2.parquet", "b")
    write_rows(tmp_path / "y.parquet", "c", "d")
    parts = [{"split": "train", "path": ["x/1.parquet", "x/2.*"]}, {"split": "test", "path": "y.parquet"}]
    write_card(
        tmp_path,
        {"config_name": "first", "data_files": parts, "default": True},
        {"config_name": "second", "data_files": "y*"},
        {"config_name": "third", "data_dir": "x"},
    )
    assert answers_of(tmp_path) == answers_of(tmp_path, name="third") == {"a", "b"}
    assert answers_of(tmp_path, split="test") == answers_of(tmp_path, name="second") == {"c", "d"}


@pytest.fixture
def server():
    """A server that remembers what it is asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    "pattern", ["{address}/x.parquet", "zip://*.parquet::{address}/x.zip", "../x.parquet", "/etc/*"]
)
def test_a_card_cannot_name_files_outside_its_folder(pattern, tmp_path, server):
    address, asked = server
    write_rows(tmp_path / "train.parquet", "a", "b")
    pattern = pattern.format(address=address)
    write_card(tmp_path, {"config_name": "default", "data_files": pattern})
    with pytest.raises(SvlError, match=r"the README of .* names '.*', which is not inside the folder"):
        answers_of(tmp_path)
    assert not asked


def test_a_folder_is_read_without_asking_anyone(tmp_path, server, monkeypatch):
    """Not for addresses of other configurations, nor of settings beside the card, nor to count a download."""
    address, asked = server
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    write_rows(tmp_path / "train.parquet", "a", "b")
    bad = {"config_name": "bad", "data_files": f"{address}/x.parquet"}
    write_card(tmp_path, bad, {"config_name": "default", "data_files": "train.parquet"})
    (tmp_path / ".huggingface.yaml").write_text(yaml.safe_dump({"configs": [bad]}))
    assert answers_of(tmp_path) == {"a", "b"}
    assert not asked


@pytest.mark.parametrize(
    "card",
    [
        "---\nconfigs: [\n---\n",
        "---\nconfigs: 5\n---\n",
        "---\nconfigs: [5]\n---\n",
        "---\nconfigs: [{config_name: default, data_files: [{split: train}]}]\n---\n",
    ],
)
def test_a_broken_card_is_one_line(card, tmp_path):
    write_rows(tmp_path / "train.parquet", "a", "b")
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(SvlError, match=r"calibration\.path: the card of the data set in .* cannot be read") as caught:
        answers_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_row_that_does_not_fit_is_one_line(tmp_path):
    rows = [{"image": {"bytes": png(0), "path": None}, "question": "?", "choices": ["x"], "answer": 99}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(SvlError, match=r"a row of .* does not fit calibration\.format=choices: IndexError"):
        draw_samples(HubSource(str(tmp_path), 1, options=RowOptions("choices")))
    with pytest.raises(SvlError, match=r"there is no column 'text', which calibration\.format=text reads"):
        draw_samples(HubSource(str(tmp_path), 1, options=RowOptions("text")))
