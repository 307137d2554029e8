"""Which weights of a folder count: the choice of transformers, in every order of preference."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers.exports import as_hub_cache, set_config
from helpers.families import LLAMA, build, config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import svl
from svl.checkpoints import export, safetensors_files
from svl.core import Plan, SvlError
from svl.models.weight_files import INDEX, WEIGHTS, WeightFiles, find_weight_files


@pytest.fixture
def llama(tmp_path):
    """A checkpoint of one file."""
    model = build(config("llama", **LLAMA), auto=AutoModelForCausalLM).model
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def add_index(folder: Path, value: float, name: str = INDEX) -> None:
    """The same tensors in two shards with an index, all of them of one value."""
    tensors = {key: torch.full_like(t, value) for key, t in load_file(folder / WEIGHTS).items()}
    names = sorted(tensors)
    shards = {f"{name[:5]}-1.safetensors": names[:9], f"{name[:5]}-2.safetensors": names[9:]}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file, {"format": "pt"})
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("metadata", ["absent", None, []])
def test_an_index_that_transformers_cannot_read_is_named(metadata, llama):
    add_index(llama, 2.0)
    (llama / WEIGHTS).unlink()
    index = json.loads((llama / INDEX).read_text()) | {"metadata": metadata}
    if metadata == "absent":
        del index["metadata"]
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises((KeyError, TypeError)):
        AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(SvlError, match=r'index\.json\' has no "metadata", which transformers asks for: add'):
        svl.load(llama, device="cpu")


@pytest.mark.parametrize("present", ["single", "single and index", "index", "named file", "named index", "all"])
def test_what_is_exported_is_what_transformers_loads(present, llama, tmp_path):
    single = load_file(llama / WEIGHTS)
    if present in ("single and index", "index", "all"):
        add_index(llama, 2.0)
    if present in ("named file", "all"):
        save_file({k: torch.full_like(t, 3.0) for k, t in single.items()}, llama / "mine.safetensors", {"format": "pt"})
        set_config(llama, transformers_weights="mine.safetensors")
    if present == "named index":
        add_index(llama, 4.0, "other.safetensors.index.json")
        set_config(llama, transformers_weights="other.safetensors.index.json")
    if present == "index":
        (llama / WEIGHTS).unlink()
    plan = Plan(6, (1, 4))
    dense = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    pruned = AutoModelForCausalLM.from_pretrained(export.save(llama, plan, tmp_path / "out")).state_dict()
    for new, old in enumerate(plan.kept):
        for part in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
            assert torch.equal(pruned[f"model.layers.{new}.{part}.weight"], dense[f"model.layers.{old}.{part}.weight"])
    assert torch.equal(pruned["lm_head.weight"], dense["lm_head.weight"])


def test_pickles_come_last(llama):
    torch.save({}, llama / "pytorch_model.bin")
    assert not find_weight_files(llama).pickled
    (llama / WEIGHTS).unlink()
    assert find_weight_files(llama) == WeightFiles((llama / "pytorch_model.bin",), pickled=True)


def test_a_snapshot_of_the_hub_cache_is_whole(llama, tmp_path):
    add_index(llama, 2.0)
    (llama / WEIGHTS).unlink()
    snapshot = as_hub_cache(llama, tmp_path / "hub")
    assert {file.name for file in find_weight_files(snapshot).files} == {"model-1.safetensors", "model-2.safetensors"}
    assert safetensors_files.read_tensors(snapshot).keys() == safetensors_files.read_tensors(llama).keys()


@pytest.mark.parametrize(
    "file",
    [
        "../out.safetensors",
        "sub/../../out.safetensors",
        ".hidden.safetensors",
        ".sub/x.safetensors",
        "link.safetensors",
    ],
)
def test_weights_elsewhere_are_refused(file, llama, tmp_path):
    (llama / WEIGHTS).rename(tmp_path / "out.safetensors")
    (llama / "sub").mkdir()
    (llama / ".sub").mkdir()
    for copy in (llama / ".hidden.safetensors", llama / ".sub" / "x.safetensors"):
        shutil.copy(tmp_path / "out.safetensors", copy)
    (llama / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    names = list(load_file(tmp_path / "out.safetensors"))
    (llama / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
    AutoModelForCausalLM.from_pretrained(llama)  # which reads them
    for work in (find_weight_files, safetensors_files.read_tensors):
        with pytest.raises(SvlError, match="lies outside the folder or is hidden"):
            work(llama)


NAMES = st.text(max_size=12) | st.sampled_from(
    ["a.safetensors", "../a.safetensors", "/", "\0", "sub", "", "loop", ".."]
)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | NAMES, lambda inner: st.lists(inner), max_leaves=3)


@settings(max_examples=300, deadline=None)
@given(index=JSON | st.dictionaries(NAMES, JSON) | st.fixed_dictionaries({"weight_map": st.dictionaries(NAMES, NAMES)}))
def test_any_index_gives_files_of_the_folder_or_one_line(tmp_path_factory, index):
    folder = tmp_path_factory.mktemp("index") / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    save_file({"a": torch.zeros(1)}, folder.parent / "a.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    try:
        files = find_weight_files(folder).files
    except SvlError:
        return
    assert {file.resolve() for file in files} == {(folder / "a.safetensors").resolve()}


@pytest.mark.parametrize("file", [WEIGHTS, INDEX])
def test_lists_longer_than_any_models_are_refused_unread(file, llama):
    if file == INDEX:
        (llama / WEIGHTS).unlink()
        with open(llama / INDEX, "wb") as index:
            index.truncate(2**30)
    else:
        length = 64 * 2**20  # of a million names
        with open(llama / WEIGHTS, "wb") as weights:
            weights.write(struct.pack("<Q", length) + b'{"a":')
            weights.truncate(length + 100)
    with pytest.raises(SvlError, match=r"list of tensors has 64 MB|longer than 64 MB"):
        find_weight_files(llama)
