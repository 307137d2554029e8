"""Export at file level equals surgery in memory, bit for bit, for every family; and it is safe to run.

The oracle is independent of the code under test: the source is loaded by transformers, pruned by `surgery.apply` and
written by `save_pretrained`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LLAMA, build, config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svl import card, checkpoint, export, loading, surgery
from svl.checkpoint import Piece, Stored
from svl.core import Patch, Plan, SvlError, Update
from svl.loading import Lvlm

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("SVL_", "HF_"))},
    "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """Content of every file of a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def loaded(folder: Path) -> Lvlm:
    """A checkpoint in memory, as it comes; no processor."""
    _, auto = loading.describe(folder)
    model = auto.from_pretrained(folder)
    return Lvlm(model.eval(), None, loading.find_anatomy(model), folder.name)


def some_plan(lvlm: Lvlm) -> Plan:
    """Without layers 1, 3 and 4, except protected ones."""
    return Plan(lvlm.anatomy.n_layers, tuple(i for i in (1, 3, 4) if i in lvlm.anatomy.removable))


def some_patch(lvlm: Lvlm, plan: Plan, seed: int = 3) -> Patch:
    """Every part of an update that every writer of every kept layer can take; a product of full rank in one."""
    chance = torch.Generator().manual_seed(seed)
    d = lvlm.anatomy.hidden_size
    updates = {}
    for layer in plan.kept:
        for role, writers in lvlm.anatomy.writers.items():
            writer = writers[layer]
            update = Update(torch.randn(d, 2, generator=chance) / 6, torch.randn(2, d, generator=chance) / 6)
            if layer == plan.kept[-1]:
                update = Update(left=torch.randn(d, d, generator=chance) / 9)
            if writer.single:
                n_in = lvlm.layers[layer].get_submodule(writer.module).weight.shape[1]
                update = replace(update, delta=torch.randn(d, n_in, generator=chance) / 6)
            if writer.single and writer.biases:
                update = replace(update, shift=torch.randn(d, generator=chance))
            updates[layer, role] = update
    return Patch(updates)


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Same tensors (names, types, shapes, bits) and the same config."""
    a, b = checkpoint.read(ours), checkpoint.read(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].read(), b[name].read()), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    configs[0].pop("layer_pruning")
    assert configs[0] == configs[1]


def in_memory(lvlm: Lvlm, plan: Plan, patch: Patch | None, folder: Path) -> Path:
    surgery.apply(lvlm, plan, patch).model.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.column("export")
def test_exports_are_what_surgery_in_memory_and_save_pretrained_give(name, tmp_path, verdict):
    source = tmp_path / "source"
    FAMILIES[name]().model.save_pretrained(source)
    before = digests(source)
    try:
        lvlm = loaded(source)
    except SvlError as refusal:
        with pytest.raises(SvlError, match=re.escape(str(refusal))):
            export.save(source, Plan(8, (1,)), tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"source"}
        verdict("refused", note=str(refusal))
        return
    plan = some_plan(lvlm)
    for case, patch in {"plain": None, "patched": some_patch(lvlm, plan)}.items():
        ours = export.save(source, plan, tmp_path / case, patch)
        assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / f"{case}-memory"))
        record = json.loads((ours / "config.json").read_text())["layer_pruning"]
        assert record["removed"] == list(plan.removed)
        assert record["compensated"] == sorted(f"{i}.{role}" for i, role in patch.updates) if patch else True
    assert digests(source) == before
    _, info = loading.describe(ours)[1].from_pretrained(ours, output_loading_info=True)
    assert not any(info.values())


# ------------------------------------------------------------------------------------------------- layouts


@pytest.fixture
def family(tmp_path):
    """A family's checkpoint, saved with the options given."""

    def saved(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        FAMILIES[name]().model.save_pretrained(folder)
        if dtype != torch.float32 or options:
            _, auto = loading.describe(folder)
            model = auto.from_pretrained(folder, dtype=dtype)
            shutil.rmtree(folder)
            model.save_pretrained(folder, **options)
        return folder

    return saved


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
def test_both_key_layouts_are_kept(name, family, tmp_path):
    """The older one on disk differs from that in memory; newer checkpoints have the one in memory."""
    names = []
    for original in (True, False):
        source = family(name, save_original_format=original)
        lvlm, plan = loaded(source), Plan(6, (2, 3))
        patch = some_patch(lvlm, plan)
        ours = export.save(source, plan, tmp_path / f"out-{original}", patch)
        assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / f"memory-{original}"))
        names.append(checkpoint.read(ours).keys())
    assert names[0] != names[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "aria", "qwen3_5", "gemma4"])
def test_half_precision_sources_in_shards(name, dtype, family, tmp_path):
    source = family(name, dtype, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    lvlm = loaded(source)
    plan = some_plan(lvlm)
    patch = some_patch(lvlm, plan)
    ours = export.save(source, plan, tmp_path / "out", patch, shard_size="20KB")
    assert len(list(ours.glob("model-*-of-*.safetensors"))) > 2
    assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / "memory"))
    index = json.loads((ours / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(s.size for s in checkpoint.read(ours).values())
    for file in ours.glob("*.safetensors"):  # as the library that defines the format reads it
        assert {k for k, f in index["weight_map"].items() if f == file.name} == load_file(file).keys()
    assert not export.save(source, plan, tmp_path / "one").joinpath(checkpoint.INDEX).exists()


def test_tied_heads_stay_tied(tmp_path):
    model = build(config("llama", **LLAMA, tie_word_embeddings=True), auto=AutoModelForCausalLM).model
    model.save_pretrained(tmp_path / "source")
    assert "lm_head.weight" not in checkpoint.read(tmp_path / "source")
    ours = export.save(tmp_path / "source", Plan(6, (1, 2)), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(ours)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_stored_one_by_one(kind, tmp_path):
    """In memory they are one tensor; on disk each has its own."""
    experts = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    build(config(kind, **LLAMA, **experts), auto=AutoModelForCausalLM).model.save_pretrained(tmp_path / "source")
    assert any(re.search(r"experts\.2\.", name) for name in checkpoint.read(tmp_path / "source"))
    lvlm, plan = loaded(tmp_path / "source"), Plan(6, (2, 3))  # expert 2 and layer 2 must not be taken for each other
    patch = some_patch(lvlm, plan)
    assert {role for _, role in patch.updates} == {"attn", "mlp"}
    ours = export.save(tmp_path / "source", plan, tmp_path / "out", patch)
    assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / "memory"))


@pytest.mark.parametrize("width", [24, 32])
def test_experts_of_either_orientation(width, tmp_path):
    """Original checkpoints of Qwen3-VL-MoE hold experts as [E, in, out], those saved by transformers either way."""
    model = FAMILIES["qwen3_vl_moe"]().model
    if width == 32:  # square: the shape does not tell
        text = {**model.config.text_config.to_dict(), "moe_intermediate_size": width}
        model = build(type(model.config)(**{**model.config.to_dict(), "text_config": text})).model
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / checkpoint.WEIGHTS)
    turned = {k: t.mT.contiguous() if "experts." in k and width != 32 else t for k, t in tensors.items()}
    save_file(turned, tmp_path / "source" / checkpoint.WEIGHTS, {"format": "pt"})
    lvlm = loaded(tmp_path / "source")
    plan = some_plan(lvlm)
    patch = some_patch(lvlm, plan)
    ours = loaded(export.save(tmp_path / "source", plan, tmp_path / "out", patch)).model.state_dict()
    theirs = surgery.apply(lvlm, plan, patch).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.parametrize("name", ["llava", "llama", "glm4v"])
def test_layers_are_blended_block_by_block(name, family, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK", 512)  # several blocks per matrix
    source = family(name, torch.bfloat16)
    lvlm, plan = loaded(source), Plan(6, (2, 3))
    blends = {1: {1: 1.0, 2: 0.75, 3: -0.5}, 4: {3: 0.25, 4: 1.0}}
    patch = replace(some_patch(lvlm, plan), blends=blends)
    for case, given in {"blended": Patch(blends=blends), "both": patch}.items():
        ours = export.save(source, plan, tmp_path / case, given)
        assert_same_checkpoint(ours, in_memory(lvlm, plan, given, tmp_path / f"{case}-memory"))
        assert "1.*" in json.loads((ours / "config.json").read_text())["layer_pruning"]["compensated"]


def test_only_what_a_patch_changes_enters_this_process(family, tmp_path, monkeypatch):
    source = family("llava", max_shard_size="60KB")
    lvlm, plan = loaded(source), Plan(6, (0, 3))
    read: list[str] = []
    original = Stored.read

    def counted(self: Stored, *rows: Any) -> torch.Tensor:
        read.append(next(name for name, stored in checkpoint.read(source).items() if stored == self))
        return original(self, *rows)

    monkeypatch.setattr(Stored, "read", counted)
    export.save(source, plan, tmp_path / "plain")
    assert read == []
    export.save(source, plan, tmp_path / "out", Patch({(2, "mlp"): some_patch(lvlm, plan).updates[2, "mlp"]}))
    assert [name.split("layers.")[1] for name in read] == ["2.mlp.down_proj.weight"]


# --------------------------------------------------------------------------------------------------- files


@pytest.fixture
def stored(tmp_path):
    """Tensors of several types in one file, as the safetensors library writes them."""
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5).to(torch.bfloat16), "c": torch.tensor(3),
        "d": torch.arange(7).to(torch.uint8), "e": torch.empty(0, 4), "f": torch.arange(40.0).reshape(10, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "all.safetensors")
    return tensors, checkpoint.header(tmp_path / "all.safetensors")


@pytest.mark.parametrize("how", ["kernel", "missing", "refused"])
def test_bytes_are_copied_with_and_without_help_of_the_kernel(how, stored, tmp_path, monkeypatch):
    def refused(*_: Any) -> int:
        raise OSError(errno.EXDEV, "across file systems")

    if how == "missing":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif how == "refused":
        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    monkeypatch.setattr(checkpoint, "BLOCK", 16)
    tensors, entries = stored
    pieces = [Piece(f"new.{k}", s.dtype, s.shape, s) for k, s in entries.items()]
    pieces.append(Piece("computed", "BF16", (3, 2), lambda: iter([torch.ones(1, 2).bfloat16()] * 3)))
    seen: list[int] = []
    checkpoint.write(tmp_path, pieces, 10**9, seen.append)
    again = load_file(tmp_path / checkpoint.WEIGHTS)
    assert torch.equal(again.pop("computed"), torch.ones(3, 2).bfloat16())
    assert again.keys() == {f"new.{k}" for k in tensors}
    assert all(torch.equal(again[f"new.{k}"], t) and again[f"new.{k}"].dtype == t.dtype for k, t in tensors.items())
    assert sum(seen) == sum(p.size for p in pieces)
    for entry in checkpoint.header(tmp_path / checkpoint.WEIGHTS).values():
        assert entry.begin % checkpoint.DTYPES[entry.dtype].itemsize == 0  # aligned


def test_rows_are_read_alone(stored):
    tensors, entries = stored
    assert all(torch.equal(entries[k].read(), t) for k, t in tensors.items())
    assert torch.equal(entries["f"].read(3, 7), tensors["f"][3:7])
    assert torch.equal(entries["f"].read(8, 99), tensors["f"][8:])


@pytest.mark.parametrize(("limit", "expected"), [(1, [1] * 4), (160, [4]), (90, [2, 2]), (45, [1] * 4)])
def test_shards_are_no_larger_than_asked(limit, expected, stored):
    pieces = [Piece(str(i), "F32", (10,), stored[1]["f"]) for i in range(4)]
    assert [len(part) for part in checkpoint.shards(pieces, limit)] == expected


@pytest.mark.parametrize(("given", "number"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), (17, 17), ("1.5KB", 1500)])
def test_sizes(given, number):
    assert export.in_bytes(given) == number


@pytest.mark.parametrize("given", ["", "0", "5 apples", "-3GB", "GB"])
def test_sizes_that_are_none(given):
    with pytest.raises(SvlError, match="shard_size is"):
        export.in_bytes(given)


# ------------------------------------------------------------------------------------------------ refusals


def rewrite(folder: Path, change: Any) -> None:
    """Replace the tensors of a checkpoint of one file."""
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file(change(tensors) or tensors, folder / checkpoint.WEIGHTS, {"format": "pt"})


def set_config(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **fields}))


def pickled(folder: Path) -> None:
    (folder / checkpoint.WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def renamed(folder: Path, name: str) -> None:
    (folder / checkpoint.WEIGHTS).rename(folder / name)


def cut(folder: Path) -> None:
    data = (folder / checkpoint.WEIGHTS).read_bytes()
    (folder / checkpoint.WEIGHTS).write_bytes(data[:-100])


def index(folder: Path, value: Any) -> None:
    (folder / checkpoint.INDEX).write_text(json.dumps(value))


LAYER = "model.layers.{}.self_attn.o_proj.weight"
REFUSALS: dict[str, tuple[Any, str]] = {
    "pickles": (pickled, r"are pickles \(pytorch_model\.bin\), which may run code"),
    "gguf": (lambda f: renamed(f, "model.Q4.gguf"), r"quantised \(model\.Q4\.gguf\)"),
    "quantised": (lambda f: set_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .gptq"),
    "fp8": (lambda f: rewrite(f, lambda t: {**t, "x": torch.zeros(2).to(torch.float8_e4m3fn)}), "quantised .*F8_E4M3"),
    "other files": (lambda f: renamed(f, "consolidated.safetensors"), "layout .* not known: it has consolidated"),
    "no weights": (lambda f: (f / checkpoint.WEIGHTS).unlink(), "has no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config of a list": (lambda f: (f / "config.json").write_text("[1]"), "holds no JSON object"),
    "cut": (cut, "damaged or incomplete"),
    "no header": (lambda f: (f / checkpoint.WEIGHTS).write_bytes(b"\xff" * 99), "damaged or incomplete"),
    "index of nothing": (lambda f: index(f, {"weight_map": [1]}), "no map of weights"),
    "lost shard": (lambda f: index(f, {"weight_map": {"a": "model-1.safetensors"}}), "lacks 'model-1.safetensors'"),
    "outside": (lambda f: index(f, {"weight_map": {"a": "../x.safetensors"}}), "lacks '../x.safetensors'"),
    "lost tensor": (lambda f: index(f, {"weight_map": {"a": checkpoint.WEIGHTS}}), "lacks tensor 'a'"),
    "lost layer": (lambda f: rewrite(f, lambda t: t.pop(LAYER.format(4)) is None), "not known: 1 weights of Llama"),
    "one more layer": (
        lambda f: rewrite(f, lambda t: {**t, LAYER.format(6): t[LAYER.format(5)].clone()}), "beyond the last decoder",
    ),
    "two layouts": (
        lambda f: rewrite(f, lambda t: {k.replace("model.layers.1.", "layers.1."): v for k, v in t.items()}),
        "number decoder layers in one way",
    ),
    "other width": (lambda f: set_config(f, intermediate_size=40), "not known: .* does not fit"),
    "no decoder": (lambda f: set_config(f, model_type="vit"), "vit model, which has no decoder layers"),
    "other depth": (lambda f: set_config(f, num_hidden_layers=5), "for 6 decoder layers, but 'source' has 5|beyond"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_exported_is_one_line_before_anything_is_written(case, tmp_path):
    change, message = REFUSALS[case]
    FAMILIES["llama"]().model.save_pretrained(tmp_path / "source")
    change(tmp_path / "source")
    with pytest.raises(SvlError, match=message) as caught:
        export.save(tmp_path / "source", Plan(6, (1,)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_plans_and_patches_that_do_not_fit_are_refused(family, tmp_path):
    source = family("qwen3_vl")
    update = Update(torch.zeros(32, 1), torch.zeros(1, 32))
    cases = {
        "7 decoder layers, but": (Plan(7, (3,)), None),
        "DeepStack": (Plan(6, (0,)), None),
        "'mlp' of layer 3, which": (Plan(6, (3,)), Patch({(3, "mlp"): update})),
        "'router' of layer 2": (Plan(6, (3,)), Patch({(2, "router"): update})),
        "blends layer 3": (Plan(6, (3,)), Patch(blends={3: {3: 1.0}})),
        "shifts the bias of 'mlp'": (Plan(6, (3,)), Patch({(2, "mlp"): Update(shift=torch.zeros(32))})),
    }
    for message, (plan, patch) in cases.items():
        with pytest.raises(SvlError, match=message):
            export.save(source, plan, tmp_path / "out", patch)
    assert not (tmp_path / "out").exists()
    export.save(source, Plan(6, (0,)), tmp_path / "out", protect="none")
    mixed = family("aria")
    rewrite(mixed, lambda t: None)
    layers = Patch(blends={1: {1: 0.5, 2: 0.5}})
    hybrid = family("qwen3_5")  # layer 0 has linear attention, layer 1 another one
    with pytest.raises(SvlError, match="cannot be merged"):
        export.save(hybrid, Plan(6, (5,)), tmp_path / "hybrid", layers, protect="none")


# -------------------------------------------------------------------------------------------------- safety


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_beside_the_weights_are_neither_read_nor_taken_along(family, tmp_path):
    source = family("llama")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Trap(tmp_path / "mark"), source / name)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("secret")
    (source / ".env").write_text("secret")
    for name in ("LICENSE", "vocab.txt", "tokenizer.model", "additional_chat_templates/tool.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    ours = export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert digests(ours).keys() == {
        "LICENSE", "vocab.txt", "tokenizer.model", "additional_chat_templates/tool.jinja", "README.md", "config.json",
        "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert (ours / "tokenizer.model").read_text() == "tokenizer.model"
    assert not (tmp_path / "mark").exists()
    torch.load(source / "training_args.bin", weights_only=False)  # the trap would have worked
    assert (tmp_path / "mark").exists()


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_remote_code_runs_only_if_asked_by_name(family, tmp_path, monkeypatch):
    source = family("llama")
    mark = tmp_path / "mark"
    (source / "modeling_mine.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    set_config(source, model_type="mine", auto_map=auto, architectures=["Mine"])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(SvlError):
        export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_the_disk_must_have_room(family, tmp_path, monkeypatch):
    source = family("llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(SvlError, match=r"needs 0\.02 GB, but .* has 0\.00 GB left; nothing was written"):
        export.save(source, Plan(6, (1,)), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "message"), [(KeyboardInterrupt, None), (OSError(errno.ENOSPC, "full"), "No space"), (ValueError, None)]
)
def test_a_failing_export_leaves_nothing(error, message, family, tmp_path, monkeypatch):
    source = family("llama")
    copied = checkpoint._copy

    def failing(*arguments: Any) -> None:
        copied(*arguments)
        raise error

    monkeypatch.setattr(checkpoint, "_copy", failing)
    with pytest.raises(SvlError if message else error, match=message):
        export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_nothing_is_overwritten(family, tmp_path):
    source = family("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for target in (tmp_path / "out", source):
        with pytest.raises(SvlError, match="exists already"):
            export.save(source, Plan(6, (1,)), target)
    assert digests(tmp_path / "out").keys() == {"mine.txt"}


def test_an_export_remembers_its_run(family, tmp_path):
    path = export.save(family("llama"), Plan(6, (1,)), tmp_path / "out", key="abc")
    assert export.key(path) == "abc"
    export.check(path)
    export.check(tmp_path / "new")
    with pytest.raises(SvlError, match="exists already"):
        export.check(tmp_path)


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{}", "null", '{"layer_pruning": 3}', "no JSON", '{"layer_pruning": {}}']
)
def test_other_folders_have_no_key(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert export.key(tmp_path) is None
    with pytest.raises(SvlError, match="exists already"):
        export.check(tmp_path)


# ---------------------------------------------------------------------------------------- the command line

COMMAND = [sys.executable, "-m", "svl.export"]


def run(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> str:
    """`svl-export` to its end; what it printed."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def write_plan(folder: Path, **fields: Any) -> None:
    (folder / "plan.json").write_text(json.dumps({"n_layers": 4, "removed": [0, 2], **fields}))


READER = """
import io, sys
sys.modules["svl"] = None  # not installed
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

torch.set_num_threads(1)
results = {}
for name, case in torch.load(sys.argv[1], weights_only=False).items():
    auto = AutoModelForImageTextToText if case["images"] else AutoModelForCausalLM
    model, info = auto.from_pretrained(case["path"], output_loading_info=True)
    images = {"images": [Image.open(io.BytesIO(b)).convert("RGB") for b in case["images"]]} if case["images"] else {}
    processor = (AutoProcessor if case["images"] else AutoTokenizer).from_pretrained(case["path"])
    inputs = processor(text=case["texts"], **images, padding=True, padding_side="left", return_tensors="pt",
                       add_special_tokens=False)
    with torch.inference_mode():
        results[name] = {
            "info": {k: sorted(map(str, v)) for k, v in info.items() if v}, "config": model.config.to_dict(),
            "ids": inputs["input_ids"], "logits": model.eval()(**inputs).logits,
            **{cache: model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[*range(9)],
                                     use_cache=cache) for cache in (True, False)},
        }
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def reloaded(request, checkpoint, samples, tmp_path_factory):
    """Exports of all three models by the command, compensated, and what a process without svl makes of them."""
    folder = tmp_path_factory.mktemp("export")
    plan = Plan(4, (0, 2), (0.1, 0.4, 0.2, 0.3), provenance={"strategy": "test", "ratio": 0.5})
    (folder / "plan.json").write_text(plan.to_json())
    cases, pruned = {}, {}
    for kind in ("llava", "qwen", "llama"):
        lvlm = request.getfixturevalue(kind)
        patch = some_patch(lvlm, plan)
        surgery.save_patch(patch, folder / f"{kind}.patch")
        run("plan=plan.json", f"source={checkpoint(kind)}", f"out={kind}", f"patch={kind}.patch", cwd=folder)
        pruned[kind] = surgery.apply(lvlm, plan, patch)
        cases[kind] = {
            "path": str(folder / kind),
            "texts": [lvlm.prompt(e.prompt, image=lvlm.sees) for e in samples.items[:3]],
            "images": [e.image_bytes for e in samples.items[:3]] if lvlm.sees else [],
        }
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-I", "-c", READER, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, plan, pruned, torch.load(folder / "results.pt", weights_only=False)


def test_exports_load_without_svl_and_compute_the_same(lm, reloaded, samples, encode, generate):
    _, plan, pruned, results = reloaded
    result, inputs = results[lm.name], encode(lm, samples.items[:3])
    assert result["info"] == {}  # no missing, unexpected or mismatched key
    assert torch.equal(result["ids"], inputs["input_ids"])
    present = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected = pruned[lm.name].model(**inputs).logits
    torch.testing.assert_close(result["logits"][present], expected[present], atol=1e-5, rtol=0)
    ours = generate(pruned[lm.name].model, inputs).sequences
    assert torch.equal(result[True], ours)
    assert torch.equal(result[False], ours)
    changed = sorted(f"{i}.{role}" for i in (1, 3) for role in ("attn", "mlp"))
    written = {**json.loads(plan.to_json()), "compensated": changed, "key": None}
    assert result["config"]["layer_pruning"] == written


def test_a_plan_written_by_hand(checkpoint, tmp_path):
    write_plan(tmp_path)
    assert run("plan=plan.json", f"source={checkpoint('llama')}", "out=new/out", cwd=tmp_path).startswith("exported to")
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out").model.layers) == 2
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_the_installed_command_says_how_it_is_used(tmp_path):
    script = Path(sys.executable).with_name("svl-export")
    for arguments in ([], ["--help"]):
        done = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "svl-export plan=FILE source=DIR|hub-id out=DIR" in done.stdout
    code = "import sys, svl.export; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("plan=plan.json out=out", "source= is missing"),
        ("plan=plan.json source=llama out", "'out' is no setting"),
        ("plan=plan.json source=llama output=out", "setting is 'output'"),
        ("plan=no.json source=llama out=out", "plan: cannot read 'no.json'"),
        ("plan=llama/config.json source=llama out=out", "not a plan: key 'n_layers' is missing"),
        ("plan=plan.json source=nowhere out=out", "source: 'nowhere' is neither a folder nor a hub id"),
        ("plan=plan.json source=owner/unknown out=out", "'owner/unknown' is no local folder, and the hub does not"),
        ("plan=plan.json source=llama out=llama", "exists already"),
        ("plan=plan.json source=llama out=out shard_size=big", "shard_size is 'big'"),
        ("plan=plan.json source=llama out=out protect=all", "protect is 'all'"),
        ("plan=plan.json source=llama out=out patch=plan.json", "no patch"),
        ("plan=plan.json source=llama out=out patch=no.safetensors", "no patch"),
        ("plan=plan.json source=llama out=out push_to_hub=a/b/c", "push_to_hub: "),
        ("plan=plan.json source=llama out=out layers=model.norm", "model.layers='model.norm' is no list"),
    ],
)
def test_mistakes_are_one_line(given, message, checkpoint, tmp_path):
    write_plan(tmp_path)
    (tmp_path / "llama").symlink_to(checkpoint("llama"))
    (line,) = run(*given.split(), cwd=tmp_path, code=1).splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_killed_export_leaves_no_checkpoint_and_can_be_run_again(checkpoint, tmp_path):
    write_plan(tmp_path)
    slow = f"""
        import time
        from svl import checkpoint, export
        copied = checkpoint._copy
        checkpoint._copy = lambda *given: (copied(*given), time.sleep(60))
        export.run({{"plan": "plan.json", "source": {str(checkpoint("llama"))!r}, "out": "out"}})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(slow)], cwd=tmp_path, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.incomplete/*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    run("plan=plan.json", f"source={checkpoint('llama')}", "out=out", cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "out"}


def test_hub_ids_are_taken_from_the_local_cache(checkpoint, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint("llama"), repository / "snapshots" / commit)
    write_plan(tmp_path)
    run("plan=plan.json", "source=owner/name", "out=out", cwd=tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    front = card.metadata(tmp_path / "out" / "README.md")
    assert front["base_model"] == "owner/name"
    plain = export.save(checkpoint("llama"), Plan(4, (0, 2)), tmp_path / "plain")
    assert digests(plain)["model.safetensors"] == digests(tmp_path / "out")["model.safetensors"]


# ---------------------------------------------------------------------------------------- model card, the Hub

RESULT = {
    "strategy": "short_lvlm", "selector": "tis", "compensation": "subspace", "limit": 100,
    "settings": {"strategy": {"_target_": "x"}, "compensation": {"_target_": "x", "rank": 4},
                 "calibration": {"file": "mine.parquet", "samples": 64, "seed": 7}},
    "versions": {"svl": "1.2.3", "torch": "4.5", "transformers": "6.7"},
    "scores": {"pope": {"metric": "accuracy", "n": 400, "metrics": {
        "accuracy": {"value": 0.715, "stderr": 0.0226, "dense": 0.98}, "f1": {"value": 0.1, "stderr": 0, "dense": 1}}},
               "odd": {"metric": "recall", "n": 3, "metrics": {
                   "recall": {"value": None, "stderr": None, "dense": 0.5}}}},
}  # fmt: skip


def test_the_model_card_is_read_by_the_hub_and_by_people(checkpoint, tmp_path):
    from huggingface_hub import ModelCard

    source = tmp_path / "Dense Model"
    shutil.copytree(checkpoint("llava"), source)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlanguage: [en]\ndatasets: [x]\n---\nText"
    )
    plan = Plan(4, (0, 2), provenance={"ratio": 0.5, "strategy": "short_lvlm"})
    patch = Patch({(1, "mlp"): Update(torch.ones(32, 1), torch.ones(1, 32))})
    ours = export.save(source, plan, tmp_path / "out", patch, result=RESULT)
    read = ModelCard.load(ours / "README.md")
    assert (read.data.license, read.data.license_name, read.data.language) == ("other", "mine", ["en"])
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert read.data.base_model is None  # a folder has no name that the Hub knows
    (result,) = read.data.eval_results  # the undefined one is no result
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("pope", "accuracy", 0.715)
    for expected in (
        "# Dense Model, 2 of 4 decoder layers", "Layers [0, 2] (0-based) of `Dense Model`", "1.mlp (layer.projection)",
        "AutoModelForImageTextToText.from_pretrained", "| selector | tis |", "| compensation | subspace (rank=4) |",
        "mine.parquet, 64 samples, seed 7", "svl 1.2.3", "| pope | accuracy | 400 | 0.715 ± 0.0226 | 0.98 |",
        "| odd | recall | 3 | undefined | 0.5 |", "first 100 samples", '"removed": [',
    ):  # fmt: skip
        assert expected in read.text, expected
    bare = ModelCard.load(export.save(checkpoint("llama"), Plan(4, (1,)), tmp_path / "bare") / "README.md")
    assert bare.data.pipeline_tag == "text-generation"
    assert bare.data.eval_results is None
    assert "AutoTokenizer" in bare.text
    assert "Recipe" not in bare.text
    assert "Results" not in bare.text


def test_results_beside_a_plan_are_those_of_its_run(tmp_path):
    (tmp_path / "plan.json").write_text(Plan(4, (1,)).to_json())
    (tmp_path / "result.json").write_text(json.dumps({"plan": {"removed": [1]}, "name": "x"}))
    assert export.result_beside(tmp_path / "plan.json", Plan(4, (1,)))["name"] == "x"
    assert export.result_beside(tmp_path / "plan.json", Plan(4, (2,))) is None
    assert export.result_beside(tmp_path / "other.json", Plan(4, (1,))) is None


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs: who am I, make a repository, say how files come, take them, commit."""

    token = "hf_secret"
    repos: dict[str, dict[str, bytes]]
    objects: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        where = f"http://{self.headers['Host']}"
        if self.path.startswith("/upload/"):  # storage: the address is the permission
            self.objects[self.path.removeprefix("/upload/")] = data
            self.answer({})
        elif self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif self.path == "/api/repos/create":
            body = json.loads(data)
            name = f"{body.get('organization') or 'me'}/{body['name']}"
            self.repos.setdefault(name, {})
            self.answer({"url": f"{where}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            kinds = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(data)["files"]
            ]  # fmt: skip
            self.answer({"files": kinds})
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            asked = json.loads(data)["objects"]
            address = {"upload": {"href": f"{where}/upload/", "header": {}}}
            for entry in asked:
                entry["actions"] = {"upload": {**address["upload"], "href": f"{where}/upload/{entry['oid']}"}}
            self.answer({"transfer": "basic", "objects": asked})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, data.decode().splitlines()):
                import base64

                value = line["value"]
                if line["key"] == "file":
                    self.repos[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repos[found[1]][value["path"]] = self.objects[value["oid"]]
            self.answer({"commitUrl": f"{where}/{found[1]}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    do_GET = do_POST = do_PUT = handle_request  # noqa: N815


@pytest.fixture
def hub():
    """A Hub on this machine: its address and what was uploaded to it."""
    handler = type("OneHub", (Hub,), {"repos": {}, "objects": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.repos  # type: ignore[attr-defined]
    server.shutdown()


def test_exports_are_pushed_to_the_hub(hub, checkpoint, tmp_path):
    address, repos = hub
    write_plan(tmp_path)
    access = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    arguments = ("plan=plan.json", f"source={checkpoint('llava')}", "out=out", "push_to_hub=me/pruned")
    refused = run(*arguments, cwd=tmp_path, code=1, **access, HF_TOKEN="hf_wrong")
    assert refused.startswith("error: push_to_hub: the Hub refuses")
    assert not (tmp_path / "out").exists()  # found out before the work
    assert repos == {}
    printed = run(*arguments, cwd=tmp_path, **access, HF_TOKEN=Hub.token)
    assert f"uploaded to {address}/me/pruned" in printed
    uploaded = {name: hashlib.sha256(data).hexdigest() for name, data in repos["me/pruned"].items()}
    assert uploaded == digests(tmp_path / "out")
