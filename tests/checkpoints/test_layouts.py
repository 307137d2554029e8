"""Odd but legal layouts of checkpoints: loading, calibration from disk, export and doctor do as transformers does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import QUIET, run_svl
from helpers.exports import set_config
from helpers.references import logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import svl
from svl.calibration.offload import load_offloaded
from svl.checkpoints import export
from svl.core import Plan, SvlError
from svl.models.weight_files import INDEX, PICKLED_INDEX, WEIGHTS

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"  # stored by the transformers of 2023
Tensors = dict[str, torch.Tensor]


def in_shards(folder: Path, *names: str, edit: Callable[[dict], object] = lambda index: None) -> None:
    """The weights in files of these names, with an index that `edit` changes."""
    tensors = list(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    index: dict = {"metadata": {}, "weight_map": {}}
    for i, name in enumerate(names):
        part = dict(tensors[i :: len(names)])
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(part, folder / name, {"format": "pt"}) if name.endswith("rs") else torch.save(part, folder / name)
        index["weight_map"] |= dict.fromkeys(part, name)
    edit(index)
    (folder / (INDEX if names[0].endswith("rs") else PICKLED_INDEX)).write_text(json.dumps(index))


def rewrite(folder: Path, edit: Callable[[Tensors], Tensors], file: str = WEIGHTS, **metadata: str) -> None:
    save_file(edit(load_file(folder / file)), folder / file, metadata or None)


TWO = ("a.safetensors", "b.safetensors")


def unlisted(index: dict) -> None:
    index["weight_map"] = dict(list(index["weight_map"].items())[1:-1])


def swapped(index: dict) -> None:
    other = dict(zip(TWO, reversed(TWO), strict=True))
    index["weight_map"] = {name: other[file] for name, file in index["weight_map"].items()}


def twice(folder: Path) -> None:
    """Every tensor of the first file is in the second, too, with other values."""
    in_shards(folder, *TWO)
    first = load_file(folder / TWO[0])
    rewrite(folder, lambda t: {**t, **{name: 2 * tensor for name, tensor in first.items()}}, TWO[1])


def tied(folder: Path, *left_out: str) -> None:
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k not in left_out})
    set_config(folder, tie_word_embeddings=True)


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "shards in a subfolder": lambda f: in_shards(f, "weights/a.safetensors", "weights/b.safetensors"),
    "an index of one file": lambda f: in_shards(f, "all.safetensors"),
    "tensors that the index leaves out": lambda f: in_shards(f, *TWO, edit=unlisted),
    "tensors in the other file than the index says": lambda f: in_shards(f, *TWO, edit=swapped),
    "an index of more than there is": lambda f: in_shards(
        f, *TWO, edit=lambda index: index["weight_map"].update({FREQUENCIES: TWO[0]})
    ),
    "tensors in two files": twice,
    "tensors that no module has": lambda f: rewrite(f, lambda t: {**t, FREQUENCIES: torch.ones(4)}),
    "files of another framework": lambda f: rewrite(f, lambda t: t, format="mlx"),
    "names without the model's prefix": lambda f: rewrite(
        f, lambda t: {k.removeprefix("model."): v for k, v in t.items()}
    ),
    "another variant beside": lambda f: shutil.copy(f / WEIGHTS, f / "model.fp16.safetensors"),
    "dtypes mixed": lambda f: rewrite(f, lambda t: {k: v.double() if "norm" in k else v.half() for k, v in t.items()}),
    "tied, both stored": tied,
    "tied, the head left out": lambda f: tied(f, HEAD),
    "tied, the embedding left out": lambda f: tied(f, EMBEDDING),
}

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda f: in_shards(f, *TWO, edit=lambda i: i.pop("metadata")), 'no "metadata", which transf'),
    "no metadata, of pickles": (
        lambda f: in_shards(f, "a.bin", "b.bin", edit=lambda i: i.pop("metadata")), 'no "metadata", which transf',
    ),
    "another variant alone": (lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"), "it has model.fp16.safet"),
    "shards without an index": (lambda f: (in_shards(f, *TWO), (f / INDEX).unlink()), "it has a.safetensors, but"),
    "pickles that the config names": (
        lambda f: (in_shards(f, "a.bin"), set_config(f, transformers_weights="a.bin")), "takes weights from 'a.bin'",
    ),
}  # fmt: skip


@pytest.fixture
def source(checkpoint, tmp_path):
    """A copy of a checkpoint of one file whose layers differ, in a dtype that its config names."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "source")


def doctor(folder: Path, code: int) -> str:
    words = (*QUIET[:-1], "model=local", f"model.path={folder}", "model.device=cpu", "n_remove=1")
    return run_svl("doctor", *words, cwd=folder.parent, code=code).stdout


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_transformers_reads_is_what_we_read(case, source, tmp_path):
    LAYOUTS[case](source)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    expected = theirs.state_dict()
    found = svl.load(source, device="cpu", dtype="auto").model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    inputs = {"input_ids": torch.arange(9, 20)[None]}
    offloaded = load_offloaded(source, device="cpu")
    (shown,) = offloaded.map(lambda lvlm, batch: logits(lvlm.model, batch), [inputs], lambda items, *_: items)
    assert torch.equal(shown, logits(theirs, inputs))

    plan = Plan(4, (1,))
    pruned = AutoModelForCausalLM.from_pretrained(export.save(source, plan, tmp_path / "out"), dtype="auto")
    state = pruned.state_dict()
    old = {name: name for name in state if ".layers." not in name}
    for new, kept in enumerate(plan.kept):
        old |= {n: n.replace(f".{new}.", f".{kept}.", 1) for n in state if f".layers.{new}." in n}
    assert old.keys() == state.keys()
    assert all(torch.equal(state[name], expected[old[name]]) for name in state)

    assert "nothing found that would end a run" in doctor(source, 0)


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_read_is_one_line_and_the_doctor_says_it(case, source):
    change, message = REFUSED[case]
    change(source)
    with pytest.raises((KeyError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(SvlError, match=message) as caught:
        svl.load(source, device="cpu")
    assert "\n" not in str(caught.value)
    assert message in doctor(source, 1)
