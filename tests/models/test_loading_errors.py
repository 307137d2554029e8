"""Checkpoints of strangers: whatever is wrong with one is one line, found early, and nothing is left out silently."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.exports import as_hub_cache
from helpers.families import randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Glm4MoeConfig, LlamaForCausalLM

import svl
from svl.core import SvlError
from svl.models.loading import read_model_config

ONE_LINE = r"^[^\n]+$"


@pytest.fixture
def copy_of(checkpoint, tmp_path):
    """A copy of a small checkpoint, to be changed."""

    def copied(kind: str) -> Path:
        return Path(shutil.copytree(checkpoint(kind), tmp_path / kind))

    return copied


def edit(file: Path, **fields) -> None:
    """Change fields of a JSON file; `a__b` is b within a, None removes it."""
    content = json.loads(file.read_text())
    for name, value in fields.items():
        *path, last = name.split("__")
        inner = content
        for part in path:
            inner = inner[part]
        inner[last] = value
        if value is None:
            del inner[last]
    file.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------- errors of other libraries


@pytest.mark.parametrize(
    ("kind", "file", "fields", "cause"),
    [
        ("llama", "config.json", {"hidden_size": "wide"}, "StrictDataclassFieldValidationError"),
        ("llama", "config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("llama", "config.json", {"rope_parameters": {"rope_type": "nowhere"}}, "KeyError"),
        ("llama", "config.json", {"hidden_act": "nowhere"}, "KeyError"),
        ("llava", "config.json", {"vision_config": 3}, "StrictDataclassFieldValidationError"),
        ("llama", "tokenizer.json", {"model": 3}, "Exception"),
        ("llama", "tokenizer.json", {"added_tokens": None}, "KeyError"),
        ("llava", "processor_config.json", {"image_processor": 3}, "AttributeError"),
        ("llava", "processor_config.json", {"image_processor__size": "large"}, "ValueError"),
    ],
    ids=str,
)
def test_what_other_libraries_raise_is_one_line(kind, file, fields, cause, copy_of):
    folder = copy_of(kind)
    edit(folder / file, **fields)
    with pytest.raises(SvlError, match=rf"cannot load a model from '{folder}': [^\n]+$") as error:
        svl.load(folder, device="cpu")
    if cause != "Exception":
        assert type(error.value.__cause__).__name__ == cause


NO_SETTINGS = ("", "{", "[]", "null", "3", '"x"', "\x00", "[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000)


@pytest.mark.parametrize("text", NO_SETTINGS, ids=lambda text: text[:8])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json", "tokenizer.json"])
def test_files_that_hold_no_settings_are_one_line(file, text, copy_of):
    folder = copy_of("llava")
    (folder / file).write_text(text)
    with pytest.raises(SvlError, match=ONE_LINE):
        svl.load(folder, device="cpu")


def test_pickles_of_anything_but_weights_are_one_line(copy_of, tmp_path):
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Payload()}))
    with pytest.raises(SvlError, match=r"cannot load a model from [^\n]+$"):
        svl.load(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_8bit": True}, "unknown method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantised_checkpoints_are_refused_before_any_work(settings, method, copy_of):
    folder = copy_of("llama")
    edit(folder / "config.json", quantization_config=settings)
    for read in (svl.load, read_model_config):
        with pytest.raises(SvlError, match=rf"from '{folder}': its weights are quantised \({method}\), and layers are"):
            read(folder)


def test_code_of_a_checkpoint_is_refused_with_the_way_to_allow_it(copy_of, tmp_path):
    folder = copy_of("llama")
    (folder / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "modeling_mine.MineConfig"})
    with pytest.raises(SvlError, match=r"contains custom code .* set model\.trust_remote_code=true$") as error:
        svl.load(folder, device="cpu")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages[99].x.y }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"]
)
def test_templates_that_fail_are_one_line(template, llava):
    from dataclasses import replace
    from types import SimpleNamespace

    def fails(conversation, **options):
        return llava.tokenizer.apply_chat_template(conversation, chat_template=template, **options)

    processor = SimpleNamespace(chat_template=template, tokenizer=llava.tokenizer, apply_chat_template=fails)
    with pytest.raises(SvlError, match=r"^the chat template of 'llava' fails: [^\n]+$"):
        replace(llava, processor=processor).prompt("red", images=1)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_config_of_a_far_larger_model_fills_no_memory(part, checkpoint, tmp_path):
    """Without its sizes, transformers takes those of a whole Llama-7B, or of a whole CLIP."""
    folder = Path(shutil.copytree(checkpoint("llava"), tmp_path / "llava"))
    content = json.loads((folder / "config.json").read_text())
    content[part] = {"model_type": content[part]["model_type"]}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(SvlError, match=r"its config describes [\d,]+ parameters, but its weights"):
        svl.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("qwen", {"vision_config": {}}, r"describes [\d,]+ parameters, but its weights"),
        ("qwen", {"text_config": {}}, r"describes more than 840 weights, far more than it has"),
        ("qwen", {"vision_config__depth": 10**9}, r"says depth=1000000000, but the checkpoint has 105 tensors"),
        ("qwen", {"vision_config__depth": 100}, r"describes more than 840 weights, far more than it has"),
        ("llava", {"vision_config": {"model_type": "swin", "depths": [2, 10**9]}}, r"says depths=1000000000, but no"),
        ("llava", {"vision_config": {"model_type": "swin", "depths": [60] * 4}}, r"describes more than 912 weights"),
        ("llava", {"text_config__vocab_size": 10**12}, r"describes [\d,]+ parameters, but its weights"),
        ("llama", {"hidden_size": 10**9}, r"describes [\d,]+ parameters, but its weights"),
        ("llama", {"num_labels": 10**9}, r"says num_labels=1000000000, but no"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_sizes_of_no_model_are_refused_before_anything_is_made(where, kind, fields, message, copy_of, hub_id):
    folder = copy_of(kind)
    edit(folder / "config.json", **fields)
    path = folder if where == "folder" else hub_id(folder)
    if where == "hub":  # where the number of tensors is not known
        message = r"its config (describes|says) |lacks \d+ weights"
    with pytest.raises(SvlError, match=message) as error:
        svl.load(path, device="cpu")
    assert "\n" not in str(error.value)


@pytest.fixture
def hub_id(tmp_path, monkeypatch):
    """Puts a folder into a cache of the hub, as the only place where its id can be found."""

    def cached(folder: Path) -> str:
        as_hub_cache(folder, tmp_path / "hub")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return "owner/name"

    return cached


def test_a_hub_id_is_loaded_with_its_weights_alone(checkpoint, copy_of, hub_id):
    assert svl.load(hub_id(copy_of("llava")), device="cpu").anatomy.n_layers == 4


def test_a_hub_id_with_an_adapter_is_refused(copy_of, hub_id):
    folder = copy_of("llava")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/name"}')
    with pytest.raises(SvlError, match="'owner/name' has a PEFT adapter"):
        svl.load(hub_id(folder), device="cpu", name="adapted")


def test_weights_of_another_shape_are_named(copy_of, capfd):
    folder = copy_of("llava")
    edit(folder / "config.json", vision_config__patch_size=8)
    with pytest.raises(
        SvlError, match=r"\S+patch_embedding.weight is stored in the shape \(32, 3, 4, 4\), but its config"
    ):
        svl.load(folder, device="cpu")
    assert "LOAD REPORT" not in capfd.readouterr().err  # transformers' table of many lines


def test_weights_without_a_place_are_left_out_with_a_word_that_no_terminal_obeys(copy_of, caplog, capfd):
    folder = copy_of("llama")
    extra = {"\x1b[31mscore.weight": torch.ones(2, 2)}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", rope_parameters__rope_theta=1e4, **{"rope_parameters__\x1b[32mq": 1})
    svl.load(folder, device="cpu", name="odd")
    assert "left out: 1 stored weights that the model has no place for, \\x1b[31mscore.weight for one" in caplog.text
    assert "\x1b" not in caplog.text + capfd.readouterr().err


VALUES = st.sampled_from([None, True, -1, 0, 3, 1e9, float("nan"), "", "x", "../x", "\x1b[31m", [], [1], {}, {"a": 1}])


@pytest.mark.parametrize("kind", ["llama", "llava"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_setting_loads_or_is_one_line(kind, data, checkpoint, tmp_path_factory):
    folder = Path(shutil.copytree(checkpoint(kind), tmp_path_factory.mktemp("any") / kind))
    files = sorted(file for file in folder.glob("*config.json"))
    file = data.draw(st.sampled_from(files))
    content = json.loads(file.read_text())
    name = data.draw(st.sampled_from(sorted(content)))
    content[name] = data.draw(VALUES)
    file.write_text(json.dumps(content))
    try:
        lvlm = svl.load(folder, device="cpu")
    except SvlError as error:
        message = str(error)
    else:
        assert len(lvlm.layers) == lvlm.anatomy.n_layers
        return
    assert "\n" not in message


# -------------------------------------------------------------------------------------- more layers than weights


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("llama", "num_hidden_layers"),
        ("llava", "text_config__num_hidden_layers"),
        ("llava", "vision_config__num_hidden_layers"),
        ("llama", "layers"),  # Kosmos-2's
    ],
)
def test_impossible_depths_are_refused_at_once(kind, field, copy_of):
    """A list per layer, or a model of so many, would take all memory."""
    folder = copy_of(kind)
    edit(folder / "config.json", **{field: 10**9})
    began = time.monotonic()
    with pytest.raises(SvlError, match=r"its config says \w*layers=1000000000, but the checkpoint has \d+ tensors"):
        svl.load(folder, device="cpu")
    assert time.monotonic() - began < 60


def test_impossible_depths_of_pickled_weights_are_refused_at_once(copy_of):
    folder = copy_of("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert svl.load(folder, device="cpu").anatomy.n_layers == 4
    edit(folder / "config.json", num_hidden_layers=10**9)
    with pytest.raises(SvlError, match=r"num_hidden_layers=1000000000, but no model has more than 10000"):
        svl.load(folder, device="cpu", name="deep")


# ----------------------------------------------------------------------------------- more weights than the config


def test_layers_that_the_config_does_not_count_are_not_left_out_silently(copy_of):
    folder = copy_of("llama")
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(
        SvlError,
        match=r"has model\.layers\.3\.\S+, but its config says 3 decoder layers: the layers behind them would be",
    ):
        svl.load(folder, device="cpu")


def test_layers_that_the_config_does_not_count_are_found_under_other_names(copy_of):
    """Weights of the bare decoder, without its head's prefix."""
    folder = copy_of("llama")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): w for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert svl.load(folder, device="cpu", name="bare").anatomy.n_layers == 4
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(SvlError, match=r"has layers\.3\.\S+, but its config says 3 decoder layers"):
        svl.load(folder, device="cpu")


def test_other_weights_without_a_place_do_not_hinder(copy_of):
    """Rotary tables of old checkpoints, heads of other tasks."""
    folder = copy_of("llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "score.weight": torch.ones(2, 2)}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", {"format": "pt"})
    assert svl.load(folder, device="cpu", name="more").anatomy.n_layers == 4


def moe(n_layers: int, **fields):
    config = Glm4MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=n_layers,
        num_attention_heads=2, num_key_value_heads=1, n_routed_experts=2, num_experts_per_tok=1, head_dim=8, **fields,
    )  # fmt: skip
    return randomise(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("n_layers", "fields"), [(46, {}), (3, {"num_nextn_predict_layers": 1})], ids=["known", "counted"]
)
def test_a_prediction_layer_is_left_out_with_a_word(n_layers, fields, checkpoint, tmp_path, caplog):
    """GLM-4.5 stores one behind its 46 layers; DeepSeek-V3's config counts it. transformers passes over it."""
    model = moe(n_layers, **fields)
    model.save_pretrained(tmp_path)
    for file in checkpoint("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    last = {name: w for name, w in weights.items() if name.startswith(f"model.layers.{n_layers - 1}.")}
    extra = {name.replace(f".{n_layers - 1}.", f".{n_layers}.", 1): w.clone() for name, w in last.items()}
    extra[f"model.layers.{n_layers}.eh_proj.weight"] = torch.ones(16, 32)
    save_file(weights | extra, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("INFO", "svl"):
        lvlm = svl.load(tmp_path, device="cpu")
    assert f"left out: prediction layer {n_layers}, stored behind the decoder" in caplog.text
    ids = torch.arange(9)[None]
    torch.testing.assert_close(lvlm.model(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    two = {name.replace(f".{n_layers}.", f".{n_layers + 1}.", 1): w.clone() for name, w in extra.items()}
    save_file(weights | extra | two, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SvlError, match=rf"has model\.layers\.{n_layers + 1}\.\S+, but its config says {n_layers} decoder"
    ):
        svl.load(tmp_path, device="cpu", name="two")


def test_snapshots_of_the_hub_cache_are_read(checkpoint, tmp_path):
    """Files there are links to blobs two folders up."""
    root = tmp_path / "models--me--mine"
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(checkpoint("llava").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert svl.load(snapshot, device="cpu").anatomy.n_layers == 4


def test_the_config_gives_the_class(checkpoint):
    assert read_model_config(checkpoint("llava"))[1] is AutoModelForImageTextToText
    config, auto = read_model_config(checkpoint("llama"))
    assert auto is AutoModelForCausalLM
    assert config.num_hidden_layers == 4
    assert isinstance(svl.load(checkpoint("llama"), device="cpu").model, LlamaForCausalLM)
