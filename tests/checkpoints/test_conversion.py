"""`svl-export convert`: checkpoints of pickles as safetensors files, tensor by tensor, running nothing."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from helpers.checkpoints import digests
from helpers.commands import QUIET, SMALL, run_svl
from helpers.exports import svl_export
from safetensors.torch import load_file

import svl
from svl.checkpoints import safetensors_files
from svl.checkpoints.conversion import convert
from svl.checkpoints.fingerprint import checkpoint_fingerprint
from svl.core import SvlError

PORTS = ("mplug_owl2", "qwen_vl_chat")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the pickle ran')",)


@pytest.fixture
def pickled(mimic, tmp_path):
    """A copy of a checkpoint of three pickles."""
    return shutil.copytree(mimic("qwen_vl_chat"), tmp_path / "source")


def shards(folder):
    return sorted(folder.glob("*.bin"))


def change(file, edit):
    """Write a pickle anew with other content."""
    tensors = torch.load(file, weights_only=True)
    torch.save(edit(tensors), file)


@pytest.mark.parametrize("name", PORTS)
def test_the_same_tensors_load_to_the_same_model(mimic, tmp_path, name):
    source = mimic(name)
    before = digests(source)
    said = svl_export("convert", f"source={source}", "out=converted", cwd=tmp_path)
    converted = tmp_path / "converted"
    assert said == f"converted to {converted}\n"
    assert digests(source) == before
    expected = {k: v for file in shards(source) for k, v in torch.load(file, weights_only=True).items()}
    stored = safetensors_files.read_tensors(converted)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[k].read(), v) and stored[k].read().dtype == v.dtype for k, v in expected.items())
    assert len(list(converted.glob("*.safetensors"))) == len(shards(source)) == 3
    kept = {f.name for f in source.iterdir() if f.suffix in (".json", ".model", ".tiktoken") and "index" not in f.name}
    assert kept <= {f.name for f in converted.iterdir()}
    assert not list(converted.glob("*.bin*"))
    one, two = (svl.load(folder, device="cpu", name=folder.name).model.state_dict() for folder in (source, converted))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_record_names_the_source_and_its_content(pickled, tmp_path):
    out = convert(pickled, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    fingerprint = checkpoint_fingerprint(str(pickled), None, tmp_path / "cache")
    assert config.pop("converted_from") == {"source": str(pickled), "fingerprint": fingerprint}
    assert config == json.loads((pickled / "config.json").read_text())


def test_tensors_that_share_memory_are_stored_apart(pickled, tmp_path):
    """As tied weights are pickled: one memory, two names."""

    def share(tensors):
        first = next(iter(tensors))
        return {**tensors, "again": tensors[first], "part": tensors[first][:1].T}

    change(shards(pickled)[0], share)
    out = convert(pickled, tmp_path / "out")
    tensors = load_file(out / "model-00001-of-00003.safetensors")
    first = tensors["again"]
    assert torch.equal(tensors["part"], first[:1].T)
    assert sum(t.shape == first.shape and torch.equal(t, first) for t in tensors.values()) == 2


def test_one_file_becomes_one_file(pickled, tmp_path):
    tensors = {k: v for file in shards(pickled) for k, v in torch.load(file, weights_only=True).items()}
    for file in (*shards(pickled), pickled / "pytorch_model.bin.index.json"):
        file.unlink()
    torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as before 2020
    out = convert(pickled, tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == tensors.keys()
    assert not (out / "model.safetensors.index.json").exists()


REFUSED = {
    "code": (lambda f: f.write_bytes(pickle.dumps({"x": Bomb()})), "without running code that is in it"),
    "a cut file": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "cannot read '.*pytorch_model-00002-of-00003.bin'"),
    "a training state": (lambda f: torch.save({"step": 3, "model": {}}, f), "holds other things than tensors by name"),
    "a missing tensor": (
        lambda f: change(f, lambda t: dict(list(t.items())[1:])),
        "lacks tensor '.*', which its index",
    ),
    "a tensor twice": (
        lambda f: shutil.copy(f.with_name("pytorch_model-00001-of-00003.bin"), f),
        "is in 'pytorch_model-00002-of-00003.bin' and in another file before it",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_nothing(pickled, tmp_path, spoil, said):
    spoil(shards(pickled)[1])
    with pytest.raises(SvlError, match=said):
        convert(pickled, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_safetensors_need_no_conversion_and_nothing_is_overwritten(mimic, pickled, tmp_path):
    source = mimic("llava_15_13b")
    said = svl_export("convert", f"source={source}", "out=out", cwd=tmp_path, code=1)
    assert "are no pickles (model-00001-of-00002.safetensors): use it as it is" in said
    said = svl_export("convert", f"source={pickled}", f"out={source}", cwd=tmp_path, code=1)
    assert "exists already; it is never overwritten" in said
    assert "there is no setting 'plan'" in svl_export("convert", "plan=x", cwd=tmp_path, code=1)


@pytest.mark.parametrize("asked", ["export.path=pruned", "evaluator=vllm"])
def test_a_run_that_cannot_end_says_at_the_start_how_to_convert(pickled, tmp_path, monkeypatch, asked):
    """With vLLM, pruned models are exported, too."""
    (tmp_path / "lib" / "vllm").mkdir(parents=True)  # nothing of it is needed here
    (tmp_path / "lib" / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    words = [word for word in QUIET if word != "benchmark=none"]
    benchmark = "benchmark=smoke" if asked == "evaluator=vllm" else "benchmark=none"
    asked_for = (*words, *SMALL, benchmark, "calibration=demo", f"model.path={pickled}", asked)
    said = run_svl(*asked_for, cwd=tmp_path, code=1).stderr
    assert f"convert them once, with 'svl-export convert source={pickled} out=DIR'" in said
    assert not list((tmp_path / "store").glob("stats/*"))
