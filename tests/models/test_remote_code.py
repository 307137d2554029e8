"""Models whose code comes with the checkpoint, with trust_remote_code: pruned by structure, or refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.exports import set_config
from safetensors.torch import save_file

import svl
from svl.checkpoints import export
from svl.core import Plan, SvlError
from svl.models.options import LoadOptions
from svl.models.weight_files import WEIGHTS
from svl.pruning.surgery import apply

CODE = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", "AutoModelForCausalLM"),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
}
TRUST = LoadOptions(device="cpu", trust_remote_code=True)


@pytest.fixture
def custom(checkpoint, tmp_path):
    """A checkpoint of a model type that transformers does not have; `offers` is the Auto class that its code is for."""

    def make(kind: str, offers: str | None = None):
        config, model, auto = CODE[kind]
        # transformers keeps code that it has run by the folder's name
        folder = shutil.copytree(checkpoint(kind), tmp_path / f"{tmp_path.name}_{kind}")
        weights = svl.load(checkpoint(kind), device="cpu").model.state_dict()  # under the names that the class has
        save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
        (folder / "configuration_zoo.py").write_text(
            f"from transformers import {config}\n\n\nclass ZooConfig({config}):\n    model_type = 'zoo'\n"
        )
        (folder / "modeling_zoo.py").write_text(
            f"from transformers import {model}\n\nfrom .configuration_zoo import ZooConfig\n\n\n"
            f"class ZooModel({model}):\n    config_class = ZooConfig\n"
        )
        code = {"AutoConfig": "configuration_zoo.ZooConfig", offers or auto: "modeling_zoo.ZooModel"}
        set_config(folder, model_type="zoo", architectures=["ZooModel"], auto_map=code)
        return folder

    return make


@pytest.mark.parametrize("kind", CODE)
def test_custom_models_are_pruned_and_exported_by_structure(custom, checkpoint, samples, encode, tmp_path, kind):
    folder, plan = custom(kind), Plan(4, (1,))
    lvlm, known = svl.load(folder, TRUST), svl.load(checkpoint(kind), device="cpu")
    assert type(lvlm.model).__module__.startswith("transformers_modules.")
    assert lvlm.takes_images == (kind == "llava")
    inputs = encode(lvlm, samples.samples)
    pruned = apply(lvlm, plan).model(**inputs).logits
    assert torch.equal(pruned, apply(known, plan).model(**inputs).logits)
    out = export.save(folder, plan, tmp_path / "out", options=TRUST)
    assert torch.equal(svl.load(out, TRUST).model(**inputs).logits, pruned)
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoConfig"] == "configuration_zoo.ZooConfig"


@pytest.mark.parametrize("kind", CODE)
def test_code_that_is_for_neither_kind_of_model_is_refused_in_one_line(custom, kind):
    with pytest.raises(SvlError, match=r"zoo model of its own code, which offers AutoConfig, AutoModel, but neither"):
        svl.load(custom(kind, "AutoModel"), TRUST)


def test_code_that_fails_is_told_in_one_line(custom):
    folder = custom("llama")
    (folder / "modeling_zoo.py").write_text("raise RuntimeError('made for another version')\n")
    with pytest.raises(SvlError, match=r"cannot load a model from .*made for another version"):
        svl.load(folder, TRUST)
