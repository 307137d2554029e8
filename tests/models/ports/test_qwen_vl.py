"""The port of Qwen-VL: equal to the original code (golden files), and to be pruned like any other model.

scripts/make_golden_qwen_vl.py made the golden files with the original code; sizes, weights and inputs are there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import assert_same_checkpoint, in_memory, some_patch, some_plan
from helpers.families import generate
from helpers.paths import ROOT
from helpers.references import close, logits, skipped, update, written_times
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import svl
from svl.calibration import attention, hooks
from svl.checkpoints import model_card
from svl.core import Patch, Plan, SvlError, Update
from svl.models import anatomy
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.models.ports.qwen_vl.configuration_qwen_vl import QwenVLConfig
from svl.models.ports.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from svl.models.ports.qwen_vl.processing_qwen_vl import QwenVLProcessor
from svl.models.ports.qwen_vl.tokenization_qwen_vl import QWenTokenizer
from svl.pruning import folding, selfcheck, surgery


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = script("make_golden_qwen_vl")
CASES = [(config, case) for config, cases in golden.CASES.items() for case in cases]
VOCABULARY = golden.OUT / "qwen.tiktoken"


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(golden.OUT / "logits.safetensors")


@cache
def tokens() -> dict:
    return json.loads((golden.OUT / "tokens.json").read_text())


def real_vocabulary() -> Path | None:
    """The vocabulary of Qwen, from $SVL_QWEN_TIKTOKEN or the package dashscope, which ships it."""
    if given := os.environ.get("SVL_QWEN_TIKTOKEN"):
        return Path(given)
    spec = importlib.util.find_spec("dashscope")
    found = Path(spec.origin).parent / "resources" / "qwen.tiktoken" if spec and spec.origin else None
    return found if found and found.exists() else None


def model_of(config: str, attn: str = "sdpa", **changes) -> QwenVLForConditionalGeneration:
    made = QwenVLConfig(**{**golden.CONFIGS[config], **changes})
    model = QwenVLForConditionalGeneration._from_config(made, attn_implementation=attn).eval()
    golden.fill(model)
    return model.requires_grad_(False)


def original_folder(folder: Path, layers: int = 6, kind: str = "safetensors", **changes) -> Path:
    """A checkpoint like the original ones: their config, code, vocabulary and key layout, shards, no processor."""
    folder.mkdir()
    (folder / "qwen.tiktoken").write_bytes(VOCABULARY.read_bytes())
    tokenizer = QWenTokenizer(str(VOCABULARY))
    (start,) = tokenizer.convert_tokens_to_ids(["<img>"])
    sizes = {**golden.SIZES, "num_hidden_layers": layers, "vocab_size": 1024, "seq_length": 512}
    sizes["visual"] = {**golden.TOWER, "image_start_id": start}
    sizes |= changes
    config = {
        **sizes, "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "torch_dtype": "float32", "bf16": True,
        "fp16": False, "onnx_safe": None, "use_flash_attn": "auto", "tokenizer_type": "QWenTokenizer", "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
    }  # fmt: skip
    named = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    end = tokenizer.eos_token_id
    settings = {"chat_format": "chatml", "eos_token_id": end, "pad_token_id": end, "do_sample": True, "top_p": 0.5}
    for name, content in {"config": config, "tokenizer_config": named, "generation_config": settings}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
        (folder / f"{name}.py").write_text("raise RuntimeError('remote code ran')\n")
    model = QwenVLForConditionalGeneration(QwenVLConfig(**sizes))
    golden.fill(model)
    state = model.state_dict()
    where = {name: f"model-{1 + (i > 40)}-of-2.{kind}" for i, name in enumerate(state)}
    for file in set(where.values()):
        part = {name: tensor.clone() for name, tensor in state.items() if where[name] == file}
        if kind == "safetensors":
            save_file(part, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return original_folder(tmp_path_factory.mktemp("qwen") / "source")


@pytest.fixture(scope="module")
def lvlm(source) -> Lvlm:
    return svl.load(source, device="cpu", name="qwen")


@pytest.fixture(scope="module")
def inputs(lvlm) -> dict[str, torch.Tensor]:
    return lvlm.encode([lvlm.prompt("What is in the picture?", images=1)], [[golden.picture(0)]])


# ------------------------------------------------------------------------------------------------- the original


def pixels_of(config: str, images: int) -> dict[str, torch.Tensor]:
    pictures = [golden.picture(i) for i in range(images)]
    return processor_of(config).image_processor(pictures, return_tensors="pt") if images else {}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("config", "case"), CASES)
def test_logits_are_the_originals(config, case, attn):
    """Of prompts (text, images, padding on the left) and of continuations from the cache, step by step."""
    model, want = model_of(config, attn), {k: expected()[f"{config}/{case}/{k}"] for k in ("logits", "new", "steps")}
    ids, mask, images = golden.inputs(config, case)
    assert torch.equal(ids, expected()[f"{config}/{case}/ids"])
    assert torch.equal(mask, expected()[f"{config}/{case}/mask"])
    pixels = pixels_of(config, images)
    out = model(ids, attention_mask=mask, use_cache=True, **pixels)
    words = mask.bool()[:, -32:]
    torch.testing.assert_close(out.logits[golden.SHOWN][words], want["logits"][words], atol=1e-5, rtol=0)
    steps = []
    for word in want["new"].split(1, 1):
        mask = torch.cat([mask, torch.ones_like(word)], 1)
        out = model(word, attention_mask=mask, past_key_values=out.past_key_values)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1)[golden.SHOWN], want["steps"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("config", "case"), CASES)
def test_generate_gives_the_originals_words(config, case):
    model = model_of(config)
    ids, mask, images = golden.inputs(config, case)
    pixels = pixels_of(config, images)
    found = model.generate(
        ids, attention_mask=mask, **pixels, max_new_tokens=golden.STEPS, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found[:, ids.shape[1] :], expected()[f"{config}/{case}/new"])


@pytest.mark.parametrize("field", ["use_dynamic_ntk", "use_logn_attn"])
def test_golden_values_depend_on_what_happens_beyond_the_training_length(field):
    want = expected()["long/text/logits"]
    ids, mask, _ = golden.inputs("long", "text")
    assert (model_of("long", **{field: False})(ids, attention_mask=mask).logits[golden.SHOWN] - want).abs().max() > 1e-2


def test_the_stretch_of_positions_belongs_to_the_sequence():
    """Two generations with one model do not disturb each other."""
    model, (short, _, _), (long, _, _) = (
        model_of("long"),
        golden.inputs("long", "crossing"),
        golden.inputs("long", "text"),
    )
    first = model(short, use_cache=True)
    model(long)
    word = expected()["long/crossing/new"][:, :1]
    step = model(word, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(step[..., ::8], expected()["long/crossing/steps"][:, :1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", golden.CONFIGS)
def test_pixels_are_the_originals(config):
    step = golden.CONFIGS[config]["visual"]["image_size"] // 14
    pixels = processor_of(config).image_processor([golden.picture(0)], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels[:, ::step, ::step], expected()[f"{config}/pixels"], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------- tokens


@cache
def tokenizer_of(vocabulary: str) -> tuple[QWenTokenizer, dict]:
    file = VOCABULARY if vocabulary == "small" else real_vocabulary()
    if file is None:
        pytest.skip("needs Qwen's vocabulary: pip install --no-deps dashscope, or $SVL_QWEN_TIKTOKEN")
    return QWenTokenizer(str(file)), tokens()[vocabulary]


def processor_of(config: str, vocabulary: str = "small") -> QwenVLProcessor:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    visual = golden.CONFIGS[config]["visual"]
    size = {"height": visual["image_size"], "width": visual["image_size"]}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, default_to_square=True)
    return QwenVLProcessor(images, tokenizer_of(vocabulary)[0])


def pads(text: str) -> str:
    """A text of the original, with visual tokens where it has the path of an image."""
    return re.sub(r"<img>[^<]+</img>", "<img>" + "<imgpad>" * 256 + "</img>", text)


@pytest.mark.parametrize("vocabulary", ["small", "real"])
def test_tokens_are_the_originals(vocabulary):
    tokenizer, want = tokenizer_of(vocabulary)
    pad = tokenizer.convert_tokens_to_ids("<imgpad>")
    assert golden.strings() == tokens()["strings"]
    assert len(golden.strings()) == len(want["ids"]) == 200
    for text, ids in zip(golden.strings(), want["ids"], strict=True):
        assert golden.shortened(tokenizer(pads(text))["input_ids"], pad) == ids, text
    for ids, plain, skipped_ in zip(want["ids"], want["decoded"], want["skipped"], strict=False):
        assert tokenizer.decode(ids) == plain
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped_


@pytest.mark.parametrize("vocabulary", ["small", "real"])
def test_conversations_are_the_originals(vocabulary):
    processor, (tokenizer, want) = processor_of("short", vocabulary), tokenizer_of(vocabulary)
    for turns, ids in zip(golden.CHATS, want["chats"], strict=True):
        messages, pictures = [], []
        for parts, answer in turns:
            content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
            messages.append({"role": "user", "content": content})
            pictures += [golden.picture(0)] * parts.count(None)
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found = processor(text=[text], images=pictures or None)["input_ids"][0]
        assert golden.shortened(found, tokenizer.convert_tokens_to_ids("<imgpad>")) == ids


def test_a_tokenizer_saved_and_read_back_is_the_same(tmp_path):
    processor = processor_of("short")
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen", **golden.SIZES}))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (type(again), type(again.tokenizer)) == (QwenVLProcessor, QWenTokenizer)
    assert again.chat_template == processor.chat_template
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    for text in golden.strings():
        assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("content", [b"", b"IQ== 0\n", b"not a vocabulary", b"IQ== 0\nIQ!= 1\n"])
def test_other_files_are_no_vocabulary(content, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=r"is no (tiktoken|whole) vocabulary"):
        QWenTokenizer(str(tmp_path / "qwen.tiktoken"))


def test_images_and_placeholders_must_be_as_many(lvlm):
    text = lvlm.prompt("Well?", images=1)
    with pytest.raises(ValueError, match="1 <imgpad> tokens and 2 images"):
        lvlm.encode([text], [[golden.picture(0)] * 2])
    inputs = lvlm.encode([text], [[golden.picture(0)]])
    with pytest.raises(ValueError, match=r"2 images need 32 tokens <imgpad>.*which have 16"):
        lvlm.model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(SvlError, match="contains <imgpad>"):
        lvlm.prompt("What is <imgpad>?", images=1)


def test_bare_placeholders_get_their_marks(lvlm):
    bare, marked = (lvlm.encode([t], [[golden.picture(0)]]) for t in ("<imgpad>\nhm", "<img><imgpad></img>\nhm"))
    assert torch.equal(bare["input_ids"], marked["input_ids"])
    assert bare["input_ids"].tolist()[0].count(lvlm.anatomy.image_token_id) == golden.TOWER["n_queries"]


# ------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("fields", [{"kv_channels": 8}, {"rotary_pct": 0.5}, {"visual": {"output_dim": 64}}])
def test_configs_that_cannot_be(fields):
    with pytest.raises(ValueError, match=r"kv_channels|rotary_pct|output_dim"):
        QwenVLConfig(**{**golden.SIZES, **fields})


@pytest.mark.parametrize("trust", [False, True])
def test_an_original_checkpoint_loads_without_its_code(source, trust):
    lvlm = svl.load(source, device="cpu", name=f"trust {trust}", trust_remote_code=trust)
    assert isinstance(lvlm.model, QwenVLForConditionalGeneration)
    assert isinstance(lvlm.processor, QwenVLProcessor)
    assert lvlm.processor.image_processor.size == {"height": 28, "width": 28}
    assert lvlm.anatomy.layers == "transformer.h"
    assert [w[0].module for w in lvlm.anatomy.writers.values()] == ["attn.c_proj", "mlp.c_proj"]
    assert not hasattr(lvlm.model.config, "auto_map")


def test_pickled_shards_load_and_run_nothing(lvlm, tmp_path):
    folder = original_folder(tmp_path / "bin", kind="bin")
    again = svl.load(folder, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in lvlm.model.state_dict().items())

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model-2-of-2.bin").write_bytes(pickle.dumps({"lm_head.weight": Bomb()}))
    with pytest.raises(SvlError, match="cannot load a model from"):
        svl.load(folder, device="cpu", name="again")
    assert not (tmp_path / "ran").exists()


def test_auto_classes_know_ports_after_importing_them(source):
    """In a fresh process. (In this one, transformers was imported before them.)"""
    code = f"""
import sys
import svl
assert not {{"torch", "transformers"}} & set(sys.modules)
import svl.models.ports
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained({str(source)!r})).__name__, type(AutoConfig.for_model("mplug_owl2")).__name__)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "QwenVLConfig MPLUGOwl2Config\n", out.stderr


def test_chats_end_at_the_end_of_a_turn(lvlm, inputs):
    """`<|im_end|>` ends an answer, as it does in the original's chat, though its generation config does not say so."""
    end = lvlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings, _ = lvlm.model._prepare_generation_config(None, max_new_tokens=3)
    assert end in settings.eos_token_id
    force = lambda _, ids: [end]  # noqa: E731
    found = lvlm.model.generate(**inputs, max_new_tokens=5, do_sample=False, prefix_allowed_tokens_fn=force)
    assert found[0, inputs["input_ids"].shape[1] :].tolist() == [end]


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """Some 130 MB, so that a second copy shows; scripts/bench_port_loading.py does it at full size."""
    bench = script("bench_port_loading")
    sizes = {
        "vocab_size": 4096, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 5504,
        "visual": {**golden.TOWER, "output_dim": 1024, "width": 384, "layers": 8, "image_start_id": 4000},
    }  # fmt: skip
    for kind in ("safetensors", "bin"):
        found = bench.measure("qwen_vl", tmp_path / kind, 5, kind, 5e7, sizes)
        assert found["size"] == found["weights"] > 1e8
        assert found["above"] < 1.1 * found["size"] + 5e7  # libraries that are loaded on the way


# ------------------------------------------------------------------------------------------------------ pruning


def plans(n: int) -> list[Plan]:
    return [Plan(n, removed) for removed in ((0,), (n - 1,), (1, 2), tuple(range(0, n, 2)), tuple(range(1, n)))]


def test_the_pruned_model_equals_the_full_one_that_skips(lvlm, inputs):
    dense, weights = logits(lvlm.model, inputs), {n: t._version for n, t in lvlm.model.state_dict().items()}
    for plan in plans(6):
        pruned = surgery.apply(lvlm, plan)
        with skipped(lvlm, plan.removed) as reference:
            want = logits(reference, inputs)
        close(logits(pruned.model, inputs), want, 1e-6)
        assert (want - dense).abs().max() > 1e-3 * dense.abs().max()
        assert [layer.attn.layer_idx for layer in pruned.layers] == list(range(len(plan.kept)))
        assert pruned.anatomy == find_anatomy(pruned.model)
        assert selfcheck.check_surgery(lvlm, pruned, plan, selfcheck.example_inputs(lvlm)) < 1e-6
    assert torch.equal(logits(lvlm.model, inputs), dense)
    assert {n: t._version for n, t in lvlm.model.state_dict().items()} == weights


def test_the_pruned_model_generates_like_the_full_one_that_skips(lvlm, inputs):
    plan = Plan(6, (1, 4))
    words, steps = generate(surgery.apply(lvlm, plan).model, inputs)
    with skipped(lvlm, plan.removed) as reference:
        want, want_steps = generate(reference, inputs)
    assert torch.equal(words, want)
    close(steps, want_steps)
    again, slow = generate(surgery.apply(lvlm, plan).model, inputs, use_cache=False)
    assert torch.equal(words, again)
    close(slow, steps)


def test_answers_do_not_depend_on_padding(lvlm):
    prompts = [lvlm.prompt(text, images=1) for text in ("Hm?", "What is in this rather noisy picture, and where?")]
    pictures = [[golden.picture(i)] for i in range(2)]
    together = generate(lvlm.model, lvlm.encode(prompts, pictures))[1]
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        close(generate(lvlm.model, lvlm.encode([prompt], [picture]))[1], together[:, i : i + 1])


def test_round_trips_keep_weights_and_the_original_layout(lvlm, inputs, source, tmp_path):
    pruned = surgery.apply(lvlm, Plan(6, (0, 3)))
    pruned.model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in pruned.model.state_dict().items())
    close(logits(again.eval(), inputs), logits(pruned.model, inputs), 1e-5)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(load_file(tmp_path / "model.safetensors")) == {
        n for n in index if not n.startswith(("transformer.h.4.", "transformer.h.5."))
    }


@pytest.mark.parametrize("chunk", [64, 5])
def test_attention_statistics_equal_eager_maps(lvlm, inputs, chunk, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    visual = inputs["input_ids"] == lvlm.anatomy.image_token_id
    assert visual.sum() == golden.TOWER["n_queries"]
    modality, cosines = torch.stack([visual, ~visual], 1).float(), {}
    plain = logits(lvlm.model, inputs)
    with attention.metering(lvlm.model, modality) as meter, hooks.cosine_hooks(lvlm, cosines):
        assert lvlm.model.config.visual._attn_implementation == "sdpa"
        close(logits(lvlm.model, inputs), plain)
    meter.check_layers(6)
    assert lvlm.model.config._attn_implementation == "sdpa"
    eager = AutoModelForImageTextToText.from_pretrained(lvlm.model.config._name_or_path, attn_implementation="eager")
    with torch.inference_mode():
        maps = eager.eval()(**inputs, output_attentions=True).attentions
    assert len(maps) == len(cosines) == 6
    for i, map_ in enumerate(maps):
        A, m = map_[0].mean(0), modality[0]
        torch.testing.assert_close(meter.received[i][0], m @ A, atol=1e-4, rtol=0)
        torch.testing.assert_close(meter.emitted[i][0], (A @ m.T).T, atol=1e-4, rtol=0)


def test_updates_multiply_what_a_layer_writes(lvlm, inputs):
    folding.check_foldable(lvlm)
    change, dense = update(128), logits(lvlm.model, inputs)
    factor = torch.eye(128) + change.left @ change.right
    for role in ("attn", "mlp"):
        with written_times(lvlm, 2, role, factor) as reference:
            want = logits(reference, inputs)
        close(logits(surgery.apply(lvlm, Plan(6, ()), Patch({(2, role): change})).model, inputs), want)
        assert (want - dense).abs().max() > 1e-3 * dense.abs().max()
        with pytest.raises(SvlError, match=f"shifts the bias of '{role}' of layer 2, which has none"):
            surgery.apply(lvlm, Plan(6, ()), Patch({(2, role): Update(shift=torch.zeros(128))}))


def test_a_gate_as_wide_as_the_model_is_no_writer():
    """w2 is a gate here, and elsewhere an output: names and shapes alone do not tell."""
    model = model_of("short", intermediate_size=256)
    assert {w.module for ws in find_anatomy(model).writers.values() for w in ws} == {"attn.c_proj", "mlp.c_proj"}


def test_exports_are_what_surgery_in_memory_gives_and_say_what_they_need(lvlm, inputs, source, tmp_path):
    plan = some_plan(lvlm)
    for case, patch in {"plain": None, "patched": some_patch(lvlm, plan)}.items():
        ours = svl.save(source, plan, tmp_path / case, patch)
        assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / f"{case}-memory"))
    text = (ours / "README.md").read_text()
    assert "It needs svl" in text
    assert "plain transformers" not in text
    assert model_card.read_card_metadata(ours / "README.md")["pipeline_tag"] == "image-text-to-text"
    (code,) = re.findall(r"```python\n(.+?)```", text, re.S)
    code += (
        "from PIL import Image\n"
        "inputs = processor(text=['hm <imgpad>'], images=[Image.new('RGB', (8, 8))], return_tensors='pt')\n"
        "found = [len(model.transformer.h), model(**inputs).logits.shape[-1]]"
    )
    assert "import svl.models.ports" in code  # see test_auto_classes_know_ports_after_importing_them
    names = {"PATH": str(ours)}
    exec(code, names)
    assert names["found"] == [len(plan.kept), 1024]
    close(
        logits(svl.load(ours, device="cpu").model, inputs), logits(surgery.apply(lvlm, plan, patch).model, inputs), 1e-5
    )


def test_layers_may_stay_on_disk(lvlm, inputs, source):
    from svl.calibration import offload

    opened = offload.load_offloaded(source, dtype="float32", device="cpu")
    assert all(p.is_meta for p in opened.layers.parameters())
    assert opened.anatomy == lvlm.anatomy
    assert isinstance(opened.processor, QwenVLProcessor)
    assert anatomy.image_token_id(opened.model.config) == lvlm.anatomy.image_token_id
