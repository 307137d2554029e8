"""Export at file level equals surgery in memory, bit for bit, for every family.

The oracle is independent of the code under test: the source is loaded by transformers, pruned by `surgery.apply` and
written by `save_pretrained`.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.checkpoints import assert_same_checkpoint, digests, in_memory, loaded, some_patch, some_plan
from helpers.exports import set_config
from helpers.families import FAMILIES, LLAMA, MHA, build, config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist

from svl.checkpoints import export, safetensors_files
from svl.checkpoints.safetensors_files import StoredTensor
from svl.core import Patch, Plan, SvlError, TensorChange
from svl.models import loading
from svl.models.weight_files import INDEX, WEIGHTS
from svl.pruning import surgery

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
    _, info = loading.read_model_config(ours)[1].from_pretrained(ours, output_loading_info=True)
    assert not any(info.values())


# ---------------------------------------------------------------------------------------------- what was trained

EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
STORED_OTHERWISE = ("qwen3_moe", "mixtral", "molmo2", "qwen3_vl_moe")  # experts one by one, fused projections


def trained_layers(lvlm, plan: Plan) -> dict[str, TensorChange]:
    """All of the first two kept layers, and products added to the matrices of the last."""
    chance = torch.Generator().manual_seed(5)
    found = {}
    for name, p in lvlm.model.named_parameters():
        layer, shape = lvlm.anatomy.layer_number(name), tuple(p.shape)
        if layer in plan.kept[:2]:
            found[name] = TensorChange(torch.randn(shape, generator=chance).to(p.dtype))
        elif layer == plan.kept[-1] and p.ndim == 2:
            left, right = torch.randn(shape[0], 2, generator=chance), torch.randn(2, shape[1], generator=chance)
            found[name] = TensorChange(left=left, right=right)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*STORED_OTHERWISE, "llama4", "llava"])
def test_what_was_trained_is_exported_however_it_is_stored(name, dtype, tmp_path):
    """As in memory, bit for bit, on top of a compensation."""
    made = FAMILIES.get(name) or (lambda: build(config(name, **LLAMA, **EXPERTS), auto=AutoModelForCausalLM))
    copy.deepcopy(made().model).to(getattr(torch, dtype)).save_pretrained(tmp_path / "source")
    lvlm = loaded(tmp_path / "source")
    plan = some_plan(lvlm)
    patch = replace(some_patch(lvlm, plan), trained=trained_layers(lvlm, plan))
    before = digests(tmp_path / "source")
    for case, each in {"all": patch, "trained": Patch(trained=patch.trained)}.items():
        ours = export.save(tmp_path / "source", plan, tmp_path / case, each)
        assert_same_checkpoint(ours, in_memory(lvlm, plan, each, tmp_path / f"{case}-memory"))
    assert digests(tmp_path / "source") == before
    if name in STORED_OTHERWISE[:3]:  # the fourth's are turned over, if at all
        stored = {key: tensor.shape for key, tensor in safetensors_files.read_tensors(tmp_path / "source").items()}
        assert any(stored.get(key) != tuple(lvlm.model.get_parameter(key).shape) for key in patch.trained)


def test_what_was_trained_and_is_computed_of_what_is_stored_is_refused(tmp_path, monkeypatch):
    """Before anything is written: a converter that adds where ours only arrange."""
    build(config("mixtral", **LLAMA, **EXPERTS), auto=AutoModelForCausalLM).model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(MergeModulelist, "convert", adding(MergeModulelist.convert))
    lvlm = loaded(tmp_path / "source")
    plan = some_plan(lvlm)
    with pytest.raises(SvlError, match=r"which recovery has trained, is stored in another layout in .*source'"):
        export.save(tmp_path / "source", plan, tmp_path / "out", Patch(trained=trained_layers(lvlm, plan)))
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def adding(convert):
    """The same conversion, of which one element gets the value of another."""

    def changed(self, *args, **kwargs):
        found = convert(self, *args, **kwargs)
        for tensor in found.values():
            tensor.view(-1)[0] = tensor.view(-1)[1]
        return found

    return changed


# ------------------------------------------------------------------------------------------------- layouts


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
        names.append(safetensors_files.read_tensors(ours).keys())
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llava", torch.bfloat16),
        ("llava", torch.float16),
        ("qwen2_5_vl", torch.float16),
        ("aria", torch.bfloat16),
        ("qwen3_5", torch.float16),
        ("gemma4", torch.bfloat16),
    ],
)
def test_half_precision_sources_in_shards(name, dtype, family, tmp_path):
    source = family(name, dtype, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    lvlm = loaded(source)
    plan = some_plan(lvlm)
    patch = some_patch(lvlm, plan)
    ours = export.save(source, plan, tmp_path / "out", patch, shard_size="20KB")
    assert len(list(ours.glob("model-*-of-*.safetensors"))) > 2
    assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / "memory"))
    index = json.loads((ours / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(s.size for s in safetensors_files.read_tensors(ours).values())
    for file in ours.glob("*.safetensors"):  # as the library that defines the format reads it
        assert {k for k, f in index["weight_map"].items() if f == file.name} == load_file(file).keys()
    assert not export.save(source, plan, tmp_path / "one").joinpath(INDEX).exists()


def test_tied_heads_stay_tied(tmp_path):
    model = build(config("llama", **LLAMA, tie_word_embeddings=True), auto=AutoModelForCausalLM).model
    model.save_pretrained(tmp_path / "source")
    assert "lm_head.weight" not in safetensors_files.read_tensors(tmp_path / "source")
    ours = export.save(tmp_path / "source", Plan(6, (1, 2)), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(ours)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_stored_one_by_one(kind, tmp_path):
    """In memory they are one tensor; on disk each has its own."""
    build(config(kind, **LLAMA, **EXPERTS), auto=AutoModelForCausalLM).model.save_pretrained(tmp_path / "source")
    assert any(re.search(r"experts\.2\.", name) for name in safetensors_files.read_tensors(tmp_path / "source"))
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
    tensors = load_file(tmp_path / "source" / WEIGHTS)
    turned = {k: t.mT.contiguous() if "experts." in k and width != 32 else t for k, t in tensors.items()}
    save_file(turned, tmp_path / "source" / WEIGHTS, {"format": "pt"})
    lvlm = loaded(tmp_path / "source")
    plan = some_plan(lvlm)
    patch = some_patch(lvlm, plan)
    ours = loaded(export.save(tmp_path / "source", plan, tmp_path / "out", patch)).model.state_dict()
    theirs = surgery.apply(lvlm, plan, patch).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.parametrize("names", ["model.layers.{}.eh_proj.weight", "model.layers.{}.mlp.down_proj.weight"])
def test_prediction_layers_are_left_out(names, family, tmp_path, caplog):
    """Some checkpoints have layers behind the last that guess tokens further ahead; transformers does not load them."""
    source, plan = family("llama"), Plan(6, (1, 2))
    tensors = load_file(source / WEIGHTS)
    behind = {names.format(number): torch.ones(32, 48) for number in (6, 7)}
    save_file({**tensors, **behind}, source / WEIGHTS, {"format": "pt"})
    set_config(source, num_nextn_predict_layers=2)
    caplog.set_level("INFO")
    ours = export.save(source, plan, tmp_path / "out")
    assert "left out: prediction layer 6, 7" in caplog.text
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    expected = export.save(source, plan, tmp_path / "expected")
    assert digests(ours)[WEIGHTS] == digests(expected)[WEIGHTS]
    assert json.loads((ours / "config.json").read_text())["num_nextn_predict_layers"] == 0
    again = export.save(ours, Plan(4, (0,)), tmp_path / "again")
    assert len(AutoModelForCausalLM.from_pretrained(again).model.layers) == 3


def test_layers_behind_what_the_config_counts_are_no_prediction_layers(family, tmp_path):
    source = family("llama")
    set_config(source, num_hidden_layers=5)
    with pytest.raises(SvlError, match=r"'model\.layers\.5\..*' is beyond the last decoder layer"):
        export.save(source, Plan(5, (1,)), tmp_path / "out")
    set_config(source, num_hidden_layers=4, num_nextn_predict_layers=1)  # one of the two
    with pytest.raises(SvlError, match=r"'model\.layers\.5\..*' is beyond the last decoder layer"):
        export.save(source, Plan(4, (1,)), tmp_path / "out")


MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def test_scales_by_depth_are_kept(tmp_path):
    """MiniCPM3 multiplies every branch by scale_depth / sqrt(layers)."""
    model = build(config("minicpm3", **MHA, **MLA, scale_depth=1.4), auto=AutoModelForCausalLM).model
    model.save_pretrained(tmp_path / "source")
    lvlm, plan = loaded(tmp_path / "source"), Plan(6, (1, 4))
    ours = export.save(tmp_path / "source", plan, tmp_path / "out")
    assert_same_checkpoint(ours, in_memory(lvlm, plan, None, tmp_path / "memory"))
    ids = torch.arange(3, 15)[None]
    expected = surgery.apply(lvlm, plan).model(input_ids=ids).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(ours)(input_ids=ids).logits, expected)


def test_settings_by_position_are_refused(tmp_path):
    """DiffLlama has another lambda in every layer, which no config can say."""
    model = build(config("diffllama", **LLAMA), auto=AutoModelForCausalLM).model
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(SvlError, match="'lambda_init' of layer 3 is made from its position"):
        export.save(tmp_path / "source", Plan(6, (2,)), tmp_path / "out")
    export.save(tmp_path / "source", Plan(6, (4, 5)), tmp_path / "out")  # behind the last kept one, all may go


@pytest.mark.parametrize("name", ["llava", "llama", "glm4v"])
def test_layers_are_blended_block_by_block(name, family, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "BLOCK", 512)  # several blocks per matrix
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
    original = StoredTensor.read

    def counted(self: StoredTensor, *rows: Any) -> torch.Tensor:
        read.append(next(name for name, stored in safetensors_files.read_tensors(source).items() if stored == self))
        return original(self, *rows)

    monkeypatch.setattr(StoredTensor, "read", counted)
    export.save(source, plan, tmp_path / "plain")
    assert read == []
    export.save(source, plan, tmp_path / "out", Patch({(2, "mlp"): some_patch(lvlm, plan).updates[2, "mlp"]}))
    assert [name.split("layers.")[1] for name in read] == ["2.mlp.down_proj.weight"]


@pytest.mark.parametrize(("given", "number"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), (17, 17), ("1.5KB", 1500)])
def test_sizes(given, number):
    assert export.parse_size(given) == number


@pytest.mark.parametrize("given", ["", "0", "5 apples", "-3GB", "GB"])
def test_sizes_that_are_none(given):
    with pytest.raises(SvlError, match="shard_size is"):
        export.parse_size(given)
