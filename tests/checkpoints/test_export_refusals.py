"""What cannot be exported is refused in one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import rewrite_tensors, set_config
from helpers.families import FAMILIES

from svl.checkpoints import export
from svl.core import Patch, Plan, SvlError, Update
from svl.models.options import LoadOptions
from svl.models.weight_files import INDEX, WEIGHTS


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def renamed(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def with_index(folder: Path, value: Any) -> None:
    """The weights as a shard `model-1.safetensors`, with an index."""
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps(value))


def add(folder: Path, name: str, tensor: torch.Tensor | None = None) -> None:
    """Another tensor: by default, as another layer's attention writes."""
    rewrite_tensors(folder, lambda t: {**t, name: t[LAYER.format(5)].clone() if tensor is None else tensor})


def as_integers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, LAYER.format(2): tensors[LAYER.format(2)].to(torch.int32)}


LAYER = "model.layers.{}.self_attn.o_proj.weight"
GPTQ = {"quant_method": "gptq", "bits": 4}
REFUSALS: dict[str, tuple[Any, str]] = {
    "pickles": (pickled, r"are pickles \(pytorch_model\.bin\), which may run code"),
    "gguf": (lambda f: renamed(f, "model.Q4.gguf"), r"quantised \(model\.Q4\.gguf\)"),
    "quantised": (lambda f: set_config(f, quantization_config=GPTQ), "quantised .gptq"),
    "fp8": (lambda f: add(f, "x", torch.zeros(2).to(torch.float8_e4m3fn)), "quantised .*F8_E4M3"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "has a PEFT adapter.*merge it first"),
    "other files": (lambda f: renamed(f, "consolidated.safetensors"), "layout .* not known: it has consolidated"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config of a list": (lambda f: (f / "config.json").write_text("[1]"), "holds no JSON object"),
    "deep config": (lambda f: (f / "config.json").write_text('{"a":' * 10**5), "cannot read .*config.json"),
    "cut": (cut, "damaged or incomplete"),
    "no header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 99), "damaged or incomplete"),
    "index of nothing": (lambda f: with_index(f, {"weight_map": [1]}), "no map of weights"),
    "empty index": (lambda f: with_index(f, {"weight_map": {}}), "no map of weights"),
    "lost shard": (lambda f: with_index(f, {"weight_map": {"a": "model-2.safetensors"}}), "lacks 'model-2.safeten"),
    "outside": (lambda f: with_index(f, {"weight_map": {"a": "../x.safetensors"}}), "takes weights from '../x.safe"),
    "hidden": (lambda f: with_index(f, {"weight_map": {"a": ".x.safetensors"}}), "takes weights from '.x.safetens"),
    "lost layer": (
        lambda f: rewrite_tensors(f, lambda t: t.pop(LAYER.format(4)) is None), "not known: 1 weights of Llama",
    ),
    "one more layer": (lambda f: add(f, LAYER.format(6)), "beyond the last decoder"),
    "layers.03": (lambda f: add(f, LAYER.format("03")), "numbers a layer as '03'"),
    "layers.３": (lambda f: add(f, LAYER.format("３")), "numbers a layer as '３'"),
    "layers.-1": (lambda f: add(f, LAYER.format("-1")), "numbers a layer as '-1'"),
    "integers": (lambda f: rewrite_tensors(f, as_integers), "stored as I32, but .* is float32"),
    "two layouts": (
        lambda f: rewrite_tensors(f, lambda t: {k.replace("model.layers.1.", "layers.1."): v for k, v in t.items()}),
        "number decoder layers in one way",
    ),
    "other width": (lambda f: set_config(f, intermediate_size=40), "not known: .* does not fit"),
    "no decoder": (lambda f: set_config(f, model_type="vit"), "vit model, which has no decoder layers"),
    "other depth": (lambda f: set_config(f, num_hidden_layers=5), "for 6 decoder layers, but 'source' has 5|beyond"),
    "a billion layers": (lambda f: set_config(f, num_hidden_layers=10**9), "num_hidden_layers=1000000000, but"),
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
    if case != "other depth":  # which shows in the plan only
        with pytest.raises(SvlError, match=message):
            export.check_exportable(tmp_path / "source", tmp_path / "out")


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
    export.save(source, Plan(6, (0,)), tmp_path / "out", options=LoadOptions(protect="none"))
    mixed = family("aria")
    rewrite_tensors(mixed, lambda t: None)
    layers = Patch(blends={1: {1: 0.5, 2: 0.5}})
    hybrid = family("qwen3_5")  # layer 0 has linear attention, layer 1 another one
    with pytest.raises(SvlError, match="cannot be merged"):
        export.save(hybrid, Plan(6, (5,)), tmp_path / "hybrid", layers, options=LoadOptions(protect="none"))
