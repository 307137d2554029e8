"""What svl uses of transformers' private names is there: a release that moves one fails here, by its name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, LlavaConfig

import svl
from svl.models import transformers_internals as internals

PACKAGE = Path(svl.__file__).parent
SEAM = Path(internals.__file__)
# what has private names of transformers that is not the seam: models in its own style
PORTS = PACKAGE / "models" / "ports"


def private_attributes(file: Path) -> set[str]:
    """Names with one leading underscore that a file reads of other objects than `self` and `cls`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if of_self else {node.attr}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and re.match("_[^_]", str(name.value)):
                found.add(name.value)
    return found


def imported_from_transformers(file: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports from modules of transformers."""
    return [
        (str(node.module), alias.name)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "transformers"
        for alias in node.names
    ]


@pytest.mark.parametrize(("module", "name"), imported_from_transformers(SEAM))
def test_every_name_can_be_imported(module, name):
    assert hasattr(__import__(module, fromlist=[name]), name)


def test_every_private_attribute_is_there(tmp_path):
    made = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    made.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    internals.keep_stored_layout(model, made)
    owners = (model, model.config, AutoModelForCausalLM)
    for name in private_attributes(SEAM):
        assert any(hasattr(owner, name) for owner in owners) or name == "_weight_conversions", name
    assert isinstance(model.all_tied_weights_keys, dict)
    assert isinstance(model._get_dtype_plan(torch.float16), dict)


def test_no_other_file_uses_them():
    names = private_attributes(SEAM)
    users = {
        file.relative_to(PACKAGE).as_posix(): private_attributes(file) & names
        for file in PACKAGE.rglob("*.py")
        if file != SEAM and PORTS not in file.parents
    }
    assert {file: found for file, found in users.items() if found} == {}


@pytest.mark.parametrize("shapes_only", [False, True])
def test_empty_models_have_shapes_and_no_values(shapes_only):
    config = LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = internals.empty_model(AutoModelForCausalLM, config, torch.bfloat16, shapes_only=shapes_only)
    whole = LlamaForCausalLM(config).to(torch.bfloat16)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())
    assert all(b.is_meta == shapes_only for b in model.buffers())
    assert not model.training
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # whatever was patched is as before


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl_moe", "llama"])
def test_models_are_filled_as_transformers_loads_them(family, tmp_path):
    """Through renamed, merged and stacked tensors alike."""
    source = FAMILIES[family]().model
    source.save_pretrained(tmp_path)
    auto = internals.model_class(source.config)
    model = internals.empty_model(auto, source.config, torch.float32)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        places = internals.match_names(model, file.keys())
        assert internals.missing_parameters(model, places) == []
        stored = {name: file.get_slice(name) for name in places}
        assert internals.fill_model(model, stored, "cpu") == []
    internals.tie_as_loaded(model, {place.name for place in places.values()})
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_class_that_makes_a_model_is_found():
    assert internals.model_class(LlavaConfig()) is AutoModelForImageTextToText
    assert internals.model_class(LlamaConfig()) is AutoModelForCausalLM
    from transformers import BertConfig, CLIPConfig, T5Config

    assert internals.model_class(CLIPConfig()) is None
    assert internals.model_class(T5Config()) is None
    assert internals.model_class(BertConfig()) in (None, AutoModelForCausalLM)


def test_names_that_transformers_passes_over():
    from transformers import Glm4vMoeForConditionalGeneration as Model

    class Named:
        _keys_to_ignore_on_load_unexpected = Model._keys_to_ignore_on_load_unexpected

    assert internals.ignored_on_load(Named(), "model.language_model.layers.46.eh_proj.weight")
    assert not internals.ignored_on_load(Named(), "model.language_model.layers.45.mlp.gate.weight")
    assert internals.ignored_on_load(Named(), "model.layers.3.self_attn.rotary_emb.inv_freq")
