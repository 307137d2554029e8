"""Models by their hub ids: downloads, the cache, revisions, gates and trouble, against a hub on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import ENVIRONMENT, QUIET, manifests, run_svl
from helpers.hub_mimics import MIMICS
from helpers.recorded_hub import RecordedHub
from helpers.tasks import script
from huggingface_hub import ModelCard, constants
from omegaconf import OmegaConf

import svl
from svl.checkpoints import conversion, export, hub
from svl.checkpoints.fingerprint import checkpoint_fingerprint
from svl.config import CONF
from svl.core import Plan, SvlError
from svl.models import loading
from svl.models.options import LoadOptions

LLAVA, CHAT = "llava-hf/llava-1.5-13b-hf", "Qwen/Qwen-VL-Chat"


def hub_id(name: str) -> str:
    """What conf/model/<name>.yaml names."""
    return str(OmegaConf.load(CONF / "model" / f"{name}.yaml").path)


@pytest.fixture
def recorded(mimic, monkeypatch, tmp_path):
    """A hub with all mimics under the ids of conf/model, asked by this process, with an empty cache."""
    with RecordedHub() as made:
        for name in MIMICS:
            made.add(hub_id(name), mimic(name))
        made.use_in_this_process(monkeypatch, tmp_path / "cache")
        yield made


def fingerprint(name: str, revision: str | None = None) -> str:
    return checkpoint_fingerprint(name, revision, Path("unused"))


@pytest.mark.parametrize("name", sorted(MIMICS))
def test_every_model_is_downloaded_once_and_then_read_from_the_cache(recorded, mimic, monkeypatch, name):
    path = hub_id(name)
    identity = fingerprint(path)
    assert identity == f"{path}@{recorded.repositories['models', path].commit}"
    commit = identity.partition("@")[2]
    lvlm = svl.load(path, device="cpu", revision=commit)
    assert lvlm.name == path.partition("/")[2]
    expected = svl.load(mimic(name), device="cpu").model.state_dict()
    found = lvlm.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    asked = [line for line in recorded.requests if line.startswith("GET") and line.endswith((".safetensors", ".bin"))]
    assert len(asked) == len(set(asked)) == len(list(mimic(name).glob("*model-0*")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recorded.requests.clear()
    assert fingerprint(path) == identity
    options = LoadOptions(revision=commit)
    config, auto = loading.read_model_config(path, options)
    assert auto.from_pretrained(path, revision=commit).config.model_type == config.model_type
    assert loading.load_processor(path, config, options)[1] == lvlm.anatomy.image_token_id
    assert not recorded.requests


def test_a_revision_is_pinned_when_the_repository_moves_on(recorded, mimic, tmp_path):
    source = tmp_path / "changing"
    source.mkdir()
    for file in mimic("llava_15_13b").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    repository = recorded.add("owner/changing", source)
    first = fingerprint("owner/changing")
    pinned = LoadOptions(device="cpu", revision=first.partition("@")[2])
    before = svl.load("owner/changing", pinned)
    (source / "note.txt").write_text("later")
    assert repository.commit != pinned.revision
    assert fingerprint("owner/changing") != first
    out = export.save("owner/changing", Plan(8, (3,)), tmp_path / "out", options=pinned)
    assert (out / "config.json").is_file()
    assert svl.load("owner/changing", pinned) is before


def test_a_revision_that_is_not_there_is_named(recorded):
    with pytest.raises(SvlError, match=r"'llava-hf/llava-1\.5-13b-hf' is no local folder, .*RevisionNotFound"):
        fingerprint(LLAVA, "nope")
    with pytest.raises(
        SvlError, match=r"cannot load a model from 'llava-hf/llava-1\.5-13b-hf': nope is not a valid git"
    ):
        svl.load(LLAVA, device="cpu", revision="nope")


def test_an_id_that_is_not_there_is_named(recorded):
    with pytest.raises(SvlError, match=r"'owner/nothing' is no local folder, and the hub does not answer for it"):
        fingerprint("owner/nothing")
    with pytest.raises(SvlError, match="cannot load a model from 'owner/nothing'"):
        svl.load("owner/nothing", device="cpu")


def test_gated_models_ask_for_their_licence_to_be_accepted(recorded, monkeypatch):
    path = hub_id("gemma3_4b")
    recorded.repositories["models", path].gated = True
    for token in (None, "of someone else"):  # 401, 403
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SvlError, match=rf"'{path}' is gated: accept its licence on the hub, and log in"):
            fingerprint(path)
        with pytest.raises(SvlError, match=rf"cannot load a model from '{path}'.* gated repo"):
            svl.load(path, device="cpu")
        with pytest.raises(SvlError, match=rf"'{path}' is no local folder, and .*GatedRepoError"):
            hub.local_checkpoint(path)
    monkeypatch.setenv("HF_TOKEN", "granted")
    assert fingerprint(path).startswith(path)
    assert svl.load(path, device="cpu").anatomy.n_layers == 8


def test_a_busy_hub_is_asked_again(recorded):
    recorded.busy = 1
    assert fingerprint(LLAVA).startswith(LLAVA)
    recorded.busy = 1
    assert svl.load(LLAVA, device="cpu").anatomy.n_layers == 8


def test_an_interrupted_download_is_resumed(recorded, mimic, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # bytes that are written at once
    recorded.cut = 1
    folder = hub.local_checkpoint(LLAVA)
    assert recorded.cut == 0
    assert len(recorded.ranges) == 1  # the rest of a file, not all of it again
    for file in mimic("llava_15_13b").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_repository_that_was_renamed_is_found(recorded):
    recorded.repositories["models", "old/name"] = type(recorded.repositories["models", LLAVA])(
        recorded.repositories["models", LLAVA].folder, moved=LLAVA
    )
    assert svl.load("old/name", device="cpu").anatomy.n_layers == 8


def test_pickles_on_the_hub_are_converted_once(recorded, tmp_path):
    said = r"'Qwen/Qwen-VL-Chat' has no safetensors files on the hub; .*svl-export convert source=Qwen/Qwen-VL-Chat"
    with pytest.raises(SvlError, match=said):
        export.check_exportable(CHAT, tmp_path / "out")
    folder = conversion.convert(CHAT, tmp_path / "converted")
    out = export.save(folder, Plan(8, (2, 5)), tmp_path / "out")
    assert svl.load(out, device="cpu").anatomy.n_layers == 6
    again = export.save(out, Plan(6, (0,)), tmp_path / "again")
    for card in (out, again):  # the original is named, not the folder of its conversion
        assert ModelCard.load(card / "README.md").data.base_model == CHAT


def test_a_whole_run_from_the_hub_and_again_without_it(recorded, monkeypatch, tmp_path):
    """Model and calibration set, in a process of its own: libraries read HF_ENDPOINT when they are imported."""
    name = "derek-thomas/ScienceQA"
    data = script("make_standins").write(tmp_path / "standins", [name])
    recorded.add(name, data / name, "datasets")
    words = [
        *QUIET, "model=llava_15_13b", "calibration=scienceqa", "calibration.samples=3", "calibration.batch_size=3",
        "n_remove=2", "hydra.run.dir=run",
    ]  # fmt: skip
    environment = {**ENVIRONMENT, **recorded.environment(tmp_path / "home")}
    command = [sys.executable, "-m", "svl", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert recorded.repositories["models", LLAVA].commit in (tmp_path / "run" / "result.json").read_text()
    recorded.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run_svl(*words, "n_remove=4", "hydra.run.dir=again", cwd=tmp_path)
    assert len(manifests(tmp_path / "store")) > 5
    assert {Path(name).parts[0] for name in manifests(tmp_path / "store")} >= {"data", "stats", "plan"}
    assert len([name for name in manifests(tmp_path / "store") if name.startswith("stats/")]) == 1
    assert not recorded.requests
