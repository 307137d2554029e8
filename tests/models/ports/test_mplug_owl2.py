"""The port of mPLUG-Owl2: equal to the original code (golden files), and read from checkpoints like the original ones.

scripts/make_golden_mplug_owl2.py made the golden files with the original code; sizes, weights and inputs are there.
That it can be pruned like any other model is tested with all families (tests/helpers/families.py).
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import assert_same_checkpoint, in_memory, some_patch, some_plan
from helpers.families import generate
from helpers.paths import ROOT
from helpers.references import close, logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import svl
from svl.calibration import attention, offload
from svl.checkpoints import model_card
from svl.core import Plan, SvlError
from svl.models import anatomy
from svl.models.lvlm import Lvlm
from svl.models.ports.mplug_owl2.configuration_mplug_owl2 import MPLUGOwl2Config
from svl.models.ports.mplug_owl2.modeling_mplug_owl2 import MPLUGOwl2ForConditionalGeneration, MPLUGOwl2Multiway
from svl.models.ports.mplug_owl2.processing_mplug_owl2 import MPLUGOwl2ImageProcessor, MPLUGOwl2Processor
from svl.models.ports.mplug_owl2.tokenization_mplug_owl2 import MPLUGOwl2Tokenizer
from svl.pruning import surgery


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = script("make_golden_mplug_owl2")
CASES = [(config, case) for config, cases in golden.CASES.items() for case in cases]
VOCABULARY = golden.OUT / "tokenizer.model"
IMAGE = 700  # id of <|image|> with this vocabulary
QUERIES = golden.ABSTRACTOR["num_learnable_queries"] + 1  # visual tokens of an image
CLIP = {  # as the original checkpoint has it
    "crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 28,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(golden.OUT / "logits.safetensors")


@cache
def tokens() -> dict:
    return json.loads((golden.OUT / "tokens.json").read_text())


def model_of(config: str, attn: str = "sdpa") -> MPLUGOwl2ForConditionalGeneration:
    made = MPLUGOwl2Config(**golden.CONFIGS[config])
    model = MPLUGOwl2ForConditionalGeneration._from_config(made, attn_implementation=attn).eval()
    golden.fill(model)
    return model.requires_grad_(False)


def tokenizer_of(mode: str = "legacy") -> MPLUGOwl2Tokenizer:
    return MPLUGOwl2Tokenizer(str(VOCABULARY), legacy=mode == "legacy")


def processor_of(config: str, mode: str = "legacy") -> MPLUGOwl2Processor:
    visual = golden.CONFIGS[config]["visual_config"]
    size = visual["visual_model"]["image_size"]
    images = MPLUGOwl2ImageProcessor(size=size, crop_size=size)
    return MPLUGOwl2Processor(images, tokenizer_of(mode), visual["visual_abstractor"]["num_learnable_queries"] + 1)


def original_folder(folder: Path, layers: int = 6, kind: str = "safetensors", spare: bool = True) -> Path:
    """A checkpoint like the original ones: their config, vocabulary and key layout, in shards; no processor.

    Its tables of positions are not those that the port computes. With `spare` tensors, it has rotary frequencies, too.
    """
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(VOCABULARY.read_bytes())
    config = json.loads((golden.OUT / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "vocab_size": IMAGE, "architectures": ["MPLUGOwl2LlamaForCausalLM"]}
    config |= {"torch_dtype": "float32", "freeze_vision_model": False, "tune_visual_abstractor": True}
    config |= {"auto_map": {"AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config"}}
    named = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.31.0"}
    files = {"config": config, "tokenizer_config": named, "generation_config": settings, "preprocessor_config": CLIP}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "configuration_mplug_owl2.py").write_text("raise RuntimeError('remote code ran')\n")
    model = MPLUGOwl2ForConditionalGeneration(MPLUGOwl2Config.from_dict(config))
    golden.fill(model)
    state = {name: tensor * 2 if name.endswith("pos_embed") else tensor for name, tensor in model.state_dict().items()}
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(layers * spare)}
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
    return original_folder(tmp_path_factory.mktemp("mplug") / "source")


@pytest.fixture(scope="module")
def lvlm(source) -> Lvlm:
    return svl.load(source, device="cpu", name="owl")


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
    """Of prompts (text, images, padding on either side) and of continuations from the cache, step by step."""
    model = model_of(config, attn)
    want = {k: expected().get(f"{config}/{case}/{k}") for k in ("ids", "mask", "logits", "new", "steps")}
    ids, mask, images = golden.inputs(config, case)
    assert torch.equal(ids, want["ids"])
    assert torch.equal(mask, want["mask"])
    out = model(ids, attention_mask=mask, use_cache=True, **pixels_of(config, images))
    words = mask.bool()[:, -32:]
    torch.testing.assert_close(out.logits[golden.SHOWN][words], want["logits"][words], atol=1e-5, rtol=0)
    if case in golden.RIGHT:
        return
    steps = []
    for word in want["new"].split(1, 1):
        mask = torch.cat([mask, torch.ones_like(word)], 1)
        out = model(word, attention_mask=mask, past_key_values=out.past_key_values)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1)[golden.SHOWN], want["steps"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("config", "case"), [c for c in CASES if c[1] not in golden.RIGHT])
def test_generate_gives_the_originals_words(config, case):
    model = model_of(config)
    ids, mask, images = golden.inputs(config, case)
    found = model.generate(
        ids, attention_mask=mask, **pixels_of(config, images), max_new_tokens=golden.STEPS, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(found[:, ids.shape[1] :], expected()[f"{config}/{case}/new"])


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "input_layernorm", "post_attention_layernorm"])
def test_golden_values_depend_on_what_visual_tokens_have_of_their_own(part):
    model = model_of("short")
    for layer in model.model.layers:
        module = getattr(layer, part, None) or getattr(layer.self_attn, part)
        module.multiway[1] = module.multiway[0]
    ids, mask, images = golden.inputs("short", "image")
    found = model(ids, attention_mask=mask, **pixels_of("short", images)).logits[golden.SHOWN]
    assert (found - expected()["short/image/logits"]).abs().max() > 1e-2


def test_each_token_goes_its_modalitys_way():
    """Against one token at a time, with ways that differ in width from what they read."""
    torch.manual_seed(0)
    both, x = MPLUGOwl2Multiway(lambda: torch.nn.Linear(4, 6)), torch.randn(2, 5, 4)
    visual = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()
    slow = [[both.multiway[int(v)](t) for t, v in zip(*row, strict=True)] for row in zip(x, visual, strict=True)]
    torch.testing.assert_close(both(x, visual), torch.stack([torch.stack(row) for row in slow]))
    for way, of in ((0, torch.zeros_like(visual)), (1, torch.ones_like(visual)), (0, None)):
        torch.testing.assert_close(both(x, of), both.multiway[way](x))


def test_weights_have_the_originals_names_and_shapes():
    want = {name: tuple(shape) for name, shape in json.loads((golden.OUT / "keys.json").read_text()).items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model_of("short").state_dict().items()}
    assert ours == {name: shape for name, shape in want.items() if not name.endswith("inv_freq")}


@pytest.mark.parametrize("config", golden.CONFIGS)
def test_pixels_are_the_originals(config):
    step = golden.CONFIGS[config]["visual_config"]["visual_model"]["image_size"] // 14
    images = processor_of(config).image_processor
    pixels = images([golden.picture(0)], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels[:, ::step, ::step], expected()[f"{config}/pixels"], atol=1e-6, rtol=0)
    direct = super(MPLUGOwl2ImageProcessor, images).process_image(golden.picture(0))
    assert images.process_image(direct).shape == (3, 60, 60)  # of arrays, too


# ------------------------------------------------------------------------------------------------------- tokens


def as_original(ids: list[int], per_image: int = 1) -> list[int]:
    """Ids with the original's one mark for each image."""
    result: list[int] = []
    count = 0
    for i in ids:
        count += i == IMAGE
        if i != IMAGE:
            result.append(i)
        elif count % per_image == 0:
            result.append(golden.IMAGE)
    return result


@pytest.mark.parametrize("mode", ["legacy", "new"])
def test_tokens_are_the_originals(mode):
    tokenizer, want = tokenizer_of(mode), tokens()[mode]
    assert golden.strings() == tokens()["strings"]
    assert len(golden.strings()) == len(want["ids"]) == 200
    assert (len(tokenizer), tokenizer.convert_tokens_to_ids("<|image|>")) == (IMAGE + 1, IMAGE)
    for text, ids in zip(golden.strings(), want["ids"], strict=True):
        assert as_original(tokenizer(text)["input_ids"]) == ids, text
        wide = text.replace("<|image|>", "<|image|>" * 3)
        assert as_original(tokenizer(wide)["input_ids"], 3) == ids, text
    for ids, plain, skipped in zip(want["ids"], want["decoded"], want["skipped"], strict=False):
        assert tokenizer.decode(ids) == plain
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped


def test_golden_tokens_depend_on_the_mode():
    assert tokens()["legacy"]["ids"] != tokens()["new"]["ids"]


@pytest.mark.parametrize("mode", ["legacy", "new"])
def test_conversations_are_the_originals(mode):
    processor, want = processor_of("short", mode), tokens()[mode]
    for turns, prompt, ids in zip(golden.CHATS, want["prompts"], want["chats"], strict=True):
        messages, pictures = [], []
        for parts, answer in turns:
            content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
            messages.append({"role": "user", "content": content})
            pictures += [golden.picture(0)] * parts.count(None)
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        asks = turns[-1][1] is None
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        assert text == prompt
        found = processor(text=[text], images=pictures or None)["input_ids"][0]
        assert as_original(found, QUERIES) == ids
        assert found.count(IMAGE) == QUERIES * len(pictures)


def test_other_roles_are_refused():
    with pytest.raises(Exception, match="knows user and assistant only, not system"):
        processor_of("short").apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)


@pytest.mark.parametrize("mode", ["legacy", "new"])
def test_a_processor_saved_and_read_back_is_the_same(mode, tmp_path):
    processor = processor_of("grid", mode)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mplug_owl2", **golden.SIZES}))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (type(again), type(again.tokenizer)) == (MPLUGOwl2Processor, MPLUGOwl2Tokenizer)
    assert isinstance(again.image_processor, MPLUGOwl2ImageProcessor)
    assert again.chat_template == processor.chat_template
    assert again.image_seq_length == 65
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    for text, ids in zip(golden.strings(), tokens()[mode]["ids"], strict=True):
        assert as_original(again.tokenizer(text)["input_ids"]) == ids


def test_images_and_placeholders_must_be_as_many(lvlm, inputs):
    text = lvlm.prompt("Well?", images=1)
    with pytest.raises(ValueError, match=r"1 <\|image\|> tokens and 2 images"):
        lvlm.encode([text], [[golden.picture(0)] * 2])
    with pytest.raises(ValueError, match=r"2 images need 14 tokens <\|image\|> \(id 700\).*which have 7"):
        lvlm.model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"0 images need 0 tokens <\|image\|>.*which have 7"):
        lvlm.model(inputs["input_ids"])
    with pytest.raises(SvlError, match=r"contains <\|image\|>"):
        lvlm.prompt("What is <|image|>?", images=1)


def test_embeddings_may_be_given_with_their_modality(lvlm, inputs):
    want, visual = logits(lvlm.model, inputs), inputs["input_ids"] == IMAGE
    images = lvlm.model.get_image_features(inputs["pixel_values"])
    embeds = lvlm.model.model.embed_tokens(inputs["input_ids"].masked_fill(visual, 5))
    embeds[visual] = images.flatten(0, 1)
    given = {"attention_mask": inputs["attention_mask"], "inputs_embeds": embeds}
    close(lvlm.model(**given, visual=visual).logits, want, 1e-6)
    assert (lvlm.model(**given).logits - want).abs().max() > 1e-2
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        lvlm.model(**given, input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        lvlm.model(**given, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="visual belongs to inputs_embeds"):
        lvlm.model(**inputs, visual=visual)


# ------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("visual_model", {"use_cls_token": False}, "belongs to mPLUG-Owl2.1"),
        ("visual_model", {"use_post_layernorm": False}, "belongs to mPLUG-Owl2.1"),
        ("visual_model", {"image_size": 56}, "do not make the grid_size 4"),
        ("visual_abstractor", {"encoder_hidden_size": 32}, r"hidden_size 48 of visual_model is not .* \(32, 48\)"),
    ],
)
def test_configs_that_cannot_be(part, fields, message):
    visual = golden.SIZES["visual_config"]
    with pytest.raises(ValueError, match=message):
        MPLUGOwl2Config(**{**golden.SIZES, "visual_config": {**visual, part: {**visual[part], **fields}}})


def test_configs_of_the_original_are_read_and_written_back(source, tmp_path):
    config = AutoConfig.from_pretrained(source)
    assert (type(config), config.image_token_index, config.image_seq_length) == (MPLUGOwl2Config, IMAGE, QUERIES)
    for name, sizes in golden.SIZES["visual_config"].items():
        part = getattr(config.visual_config, name)
        assert {k: getattr(part, k) for k in sizes} == sizes
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_json_string() == config.to_json_string()
    assert MPLUGOwl2Config().image_seq_length == 65


@pytest.mark.parametrize("trust", [False, True])
def test_an_original_checkpoint_loads_without_its_code(source, trust):
    lvlm = svl.load(source, device="cpu", name=f"trust {trust}", trust_remote_code=trust)
    assert isinstance(lvlm.model, MPLUGOwl2ForConditionalGeneration)
    assert isinstance(lvlm.processor, MPLUGOwl2Processor)
    assert lvlm.processor.image_seq_length == QUERIES
    assert lvlm.tokenizer.legacy is False
    assert lvlm.anatomy.layers == "model.layers"
    assert lvlm.anatomy.image_token_id == IMAGE
    assert [w[0].module for w in lvlm.anatomy.writers.values()] == ["self_attn.o_proj", "mlp.down_proj"]
    pixels = lvlm.processor.image_processor([golden.picture(0)], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, pixels_of("short", 1)["pixel_values"])
    tables = {name: t for name, t in lvlm.model.state_dict().items() if name.endswith("pos_embed")}
    own = model_of("short").state_dict()
    assert len(tables) == 4
    assert all(torch.equal(t, 2 * own[name]) for name, t in tables.items())  # the checkpoint's, not computed ones


def test_pickled_shards_load_and_run_nothing(lvlm, tmp_path):
    folder = original_folder(tmp_path / "bin", kind="bin")
    again = svl.load(folder, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in lvlm.model.state_dict().items())

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model-2-of-2.bin").write_bytes(pickle.dumps({"lm_head.weight": Bomb()}))
    with pytest.raises((SvlError, pickle.UnpicklingError)):
        svl.load(folder, device="cpu", name="again")
    assert not (tmp_path / "ran").exists()


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """Some 130 MB, so that a second copy shows; scripts/bench_port_loading.py does it at full size."""
    bench = script("bench_port_loading")
    parts = {
        "visual_model": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
        "visual_abstractor": {"hidden_size": 256, "encoder_hidden_size": 256, "num_hidden_layers": 2},
    }
    sizes = {
        "vocab_size": 4096, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 2752,
        "visual_config": parts,
    }  # fmt: skip
    found = bench.measure("mplug_owl2", tmp_path / "source", 4, "bin", 5e7, sizes)
    assert found["size"] == found["weights"] > 1e8
    assert found["above"] < 1.1 * found["size"] + 5e7  # libraries that are loaded on the way


# ------------------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_visual_parts_keep_their_attention(source, inputs, attn):
    loaded = AutoModelForImageTextToText.from_pretrained(
        source, **({} if attn == "sdpa" else {"attn_implementation": attn})
    )
    owl = Lvlm(loaded.eval(), None, anatomy.find_anatomy(loaded), "owl")
    pruned = surgery.apply(owl, Plan(6, (1,)))

    def kinds(model):
        visual = model.config.visual_config
        return {p._attn_implementation for p in (visual, visual.visual_model, visual.visual_abstractor)}

    for model in (owl.model, pruned.model):
        assert kinds(model) == {model.config._attn_implementation} == {attn}
        modality = torch.ones(1, 2, inputs["input_ids"].shape[1])
        with attention.metering(model, modality):
            assert (model.config._attn_implementation, kinds(model)) == (attention.NAME, {attn})
            logits(model, inputs)
        assert kinds(model) == {model.config._attn_implementation} == {attn}


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
        n for n in index if not n.startswith(("model.layers.4.", "model.layers.5.")) and not n.endswith("inv_freq")
    }


def test_exports_are_what_surgery_in_memory_gives_and_say_what_they_need(lvlm, inputs, source, tmp_path):
    plan = some_plan(lvlm)
    lean = original_folder(tmp_path / "lean", spare=False)
    for case, patch in {"plain": None, "patched": some_patch(lvlm, plan)}.items():
        ours = svl.save(lean, plan, tmp_path / case, patch)
        assert_same_checkpoint(ours, in_memory(lvlm, plan, patch, tmp_path / f"{case}-memory"))
    text = (ours / "README.md").read_text()
    assert "It needs svl" in text
    assert model_card.read_card_metadata(ours / "README.md")["pipeline_tag"] == "image-text-to-text"
    (code,) = re.findall(r"```python\n(.+?)```", text, re.S)
    code += (
        "from PIL import Image\n"
        "inputs = processor(text=['hm <|image|>'], images=[Image.new('RGB', (8, 8))], return_tensors='pt')\n"
        "found = [len(model.model.layers), model(**inputs).logits.shape[-1]]"
    )
    assert "import svl.models.ports" in code  # see test_auto_classes_know_ports_after_importing_them
    names = {"PATH": str(ours)}
    exec(code, names)
    assert names["found"] == [len(plan.kept), IMAGE]
    want = logits(surgery.apply(lvlm, plan, patch).model, inputs)
    for folder in (ours, svl.save(source, plan, tmp_path / "spare", patch)):
        close(logits(svl.load(folder, device="cpu").model, inputs), want, 1e-5)


def test_layers_may_stay_on_disk(lvlm, inputs, source):
    opened = offload.load_offloaded(source, dtype="float32", device="cpu")
    assert all(p.is_meta for p in opened.layers.parameters())
    assert opened.anatomy == lvlm.anatomy
    assert isinstance(opened.processor, MPLUGOwl2Processor)
    assert anatomy.image_token_id(opened.model.config) == IMAGE
    (found,) = opened.map(lambda m, batch: logits(m.model, batch), [inputs], lambda items, *_: items)
    close(found, logits(lvlm.model, inputs), 1e-6)
