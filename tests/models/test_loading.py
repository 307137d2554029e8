"""Loading checkpoints, finding their parts, and encoding prompts."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import svl
from svl.core import SvlError
from svl.models.anatomy import Writer, find_anatomy
from svl.models.loading import image_placeholder

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


# ---------------------------------------------------------------------------------------------- anatomy


@pytest.mark.parametrize(
    ("kind", "layers", "token"),
    [
        ("llava", "model.language_model.layers", "<image>"),
        ("qwen", "model.language_model.layers", "<|image_pad|>"),
        ("llama", "model.layers", None),
    ],
)
def test_anatomy_is_found_by_structure(kind, layers, token, request):
    """The vision towers are as deep as the decoder; LLaVA's is as wide, with writers of its own."""
    lvlm = request.getfixturevalue(kind)
    anatomy = lvlm.anatomy
    assert (anatomy.layers, anatomy.n_layers, anatomy.hidden_size) == (layers, 4, 32)
    assert anatomy.writers == {
        role: (Writer(name, {f"{name}.weight": False}, (f"{name}.bias",) if kind == "llama" else ()),) * 4
        for role, name in (("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj"))
    }
    assert anatomy.image_token_id == (token and lvlm.tokenizer.convert_tokens_to_ids(token))
    assert lvlm.takes_images == (token is not None)
    assert anatomy.removable == (0, 1, 2, 3)
    assert (lvlm.name, len(lvlm.layers), lvlm.device.type) == (kind, 4, "cpu")


def test_several_lists_of_decoder_layers_are_not_guessed_between(randomise):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **SMALL))
    model.draft = nn.ModuleList(model.model.layers)
    with pytest.raises(
        SvlError, match=r"several lists of decoder layers.*model\.layers, draft, choose it with model\.layers="
    ):
        find_anatomy(model)
    assert find_anatomy(model, "draft").layers == "draft"
    with pytest.raises(
        SvlError, match=r"model\.layers='drafts' is no list of 2 layers; candidates: model\.layers, draft"
    ):
        find_anatomy(model, "drafts")


def test_layers_of_unknown_structure_can_be_named():
    """GPT-2 keeps its weights transposed: no writer is known, so nothing is guessed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=1))
    with pytest.raises(SvlError, match=r"no decoder layers.*transformer\.h, choose it with model\.layers="):
        find_anatomy(model)
    assert find_anatomy(model, "transformer.h").writers == {}


def deepstack():
    """Qwen3-VL: the i-th feature is added after decoder layer i, whichever layer that is."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "deepstack_visual_indexes": [0, 2]}  # fmt: skip
    text = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 20}
    with torch.device("meta"):
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize(
    ("protect", "protected", "waived"),
    [("auto", (0, 1), ()), ("none", (), (0, 1)), ([1, 3], (1, 3), (0,)), ([], (), (0, 1))],
    ids=str,
)
def test_the_user_decides_which_layers_are_protected(protect, protected, waived):
    anatomy = find_anatomy(deepstack(), protect=protect)
    assert (tuple(anatomy.protected), anatomy.waived) == (protected, waived)
    assert anatomy.removable == tuple(i for i in range(4) if i not in protected)
    reasons = {0: "DeepStack", 1: "DeepStack", 3: "model.protect names it"}
    assert all(reasons[i] in why for i, why in anatomy.protected.items())


@pytest.mark.parametrize(
    ("protect", "message"),
    [("non", r"model\.protect is 'non'.*did you mean 'none'"), (7, r"model\.protect is '7'"),
     ([1, 4], r"model\.protect names layers \[4\], but the model has layers 0\.\.3")],
)  # fmt: skip
def test_wrong_protection_is_refused(protect, message):
    with pytest.raises(SvlError, match=message):
        find_anatomy(deepstack(), protect=protect)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_layer_interval": 2}, "fixed intervals.*cross_layer_interval"),
        ({"kv_source_layers": [0, 0]}, "keys and values of others.*kv_source_layers"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
    ],
)
def test_layers_that_cannot_be_taken_apart_are_refused_with_the_reason(fields, message):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **SMALL))
    for name, value in fields.items():
        setattr(model.config, name, value)
    with pytest.raises(SvlError, match=f"layers of llama cannot be removed: .*{message}"):
        find_anatomy(model)


# ---------------------------------------------------------------------------------------------- loading


def test_a_loaded_model_is_ready_for_inference(checkpoint):
    lvlm = svl.load(checkpoint("llava"), device="cpu", dtype="bfloat16", name="mine")
    assert lvlm.name == "mine"
    assert lvlm.model.dtype == torch.bfloat16
    assert not lvlm.model.training
    assert lvlm.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32  # positions stay exact
    assert lvlm.parameters() == sum(p.numel() for p in lvlm.model.parameters())
    assert (
        svl.load(checkpoint("llava"), device="cpu", dtype="bfloat16", name="mine") is lvlm
    )  # shared by a sweep's jobs


def test_a_folder_that_was_written_again_is_read_again(checkpoint, tmp_path):
    """Other weights under the same names, of the same size."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    first = svl.load(folder, device="cpu")
    assert svl.load(folder, device="cpu") is first
    weight = first.layers[0].mlp.down_proj.weight.clone()
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    save_file({**tensors, name: 2 * tensors[name]}, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(svl.load(folder, device="cpu").layers[0].mlp.down_proj.weight, 2 * weight)


def test_a_path_may_start_at_home(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint("llama").parent))
    assert svl.load("~/llama", device="cpu").name == "llama"


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(SvlError, match=f"there is no folder '{path}'"):
        svl.load(path)


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=20, **SMALL))


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 8, "patch_size": 4}))


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
             for what, n in (("layers", 2), ("ffn_dim", 16), ("attention_heads", 2))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(d_model=16, vocab_size=20, max_position_embeddings=20, **sizes))


@pytest.mark.parametrize("build", [bert, clip, bart], ids=lambda f: f.__name__)
def test_models_without_a_language_decoder_are_refused(build, checkpoint, tmp_path):
    build().save_pretrained(tmp_path)
    for file in checkpoint("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(SvlError, match="no decoder layers"):
        svl.load(tmp_path)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot load a model from .*incomplete"),
        (edit(intermediate_size=64), "cannot load a model from"),
        (edit(num_hidden_layers=5), "lacks 16 weights, model.layers.4"),  # transformers would fill them with noise
        (edit(model_type="llamb"), "model type `llamb`"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: neither model.safetensors"),
        (lambda folder: [f.unlink() for f in folder.glob("tokenizer*")], "cannot load a model from .*tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_one_plain_error(damage, message, checkpoint, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(SvlError, match=message) as error:
        svl.load(tmp_path / "damaged")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "message"), [({"dtype": "float8"}, "model.dtype is 'float8'"),
                                                 ({"device": "gpu"}, "model.device='gpu'")])  # fmt: skip
def test_wrong_options_are_refused(option, message, checkpoint):
    with pytest.raises(SvlError, match=message):
        svl.load(checkpoint("llama"), **option)


@pytest.mark.parametrize("token", ["<image>", 4])
def test_the_user_may_name_the_image_token(token, checkpoint, tmp_path):
    """Where the config does not say, or says it otherwise."""
    shutil.copytree(checkpoint("llava"), tmp_path / "other")
    edit(image_token_index=7, image_token_id=7)(tmp_path / "other")
    assert svl.load(tmp_path / "other", device="cpu").anatomy.image_token_id == 7
    assert svl.load(tmp_path / "other", device="cpu", image_token=token).anatomy.image_token_id == 4
    with pytest.raises(SvlError, match=r"model\.image_token '<imag>' is no token.*did you mean '<image>'"):
        svl.load(tmp_path / "other", device="cpu", image_token="<imag>")


def test_a_processor_may_know_the_image_token(llava):
    class Unaware:
        vision_config = None

    assert image_placeholder(Unaware, llava.processor, None) == 4
    assert image_placeholder(Unaware, llava.tokenizer, None) is None


# --------------------------------------------------------------------------------------------- encoding


def test_prompts_follow_the_chat_template(llava, qwen, llama):
    assert llava.prompt("red", images=1) == "<s>user <image>red assistant"
    assert llava.prompt("red", images=0) == "<s>user red assistant"
    assert qwen.prompt("red", images=1) == "user <|vision_start|><|image_pad|><|vision_end|>red assistant"
    assert llama.prompt("red", images=0) == "<s>user red assistant"


def test_image_marks_within_a_prompt_are_refused(llava, qwen, llama):
    """Training data often has them; with the template's own there would be more marks than images."""
    for lvlm, mark in ((llava, "<image>"), (qwen, "<|image_pad|>")):
        with pytest.raises(SvlError, match=f"contains {re.escape(mark)}; leave it out"):
            lvlm.prompt(f"{mark}\nwhat is red", images=1)
    assert "<image>" in llama.prompt("what is <image>", images=0)


def test_without_a_template_text_stays_plain_and_images_have_no_place(checkpoint):
    lvlm = svl.load(checkpoint("llava"), device="cpu", name="plain")
    lvlm.processor.chat_template = None
    assert lvlm.prompt("red", images=0) == "red"
    words = lvlm.tokenizer.convert_ids_to_tokens(lvlm.encode(["red", "round red"])["input_ids"].flatten().tolist())
    assert words == ["<pad>", "<s>", "red", "<s>", "round", "red"]
    with pytest.raises(SvlError, match="'plain' has no chat template"):
        lvlm.prompt("red", images=1)


def test_batches_are_padded_on_the_left_with_one_bos(lm, samples, encode):
    inputs = encode(lm, samples.samples)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    assert not mask.all()
    assert (mask.int().diff(dim=1) >= 0).all()
    assert mask[:, -1].all()
    assert (
        (ids == 2).sum(1) == (0 if lm.name == "qwen" else 1)
    ).all()  # the template writes it, the tokenizer must not
    assert [int(n) for n in mask.sum(1)] == [int(encode(lm, [s])["attention_mask"].sum()) for s in samples.samples]


def test_every_visual_token_of_every_picture_has_its_place(vlm, samples, encode):
    inputs = encode(vlm, samples.samples)
    visual = (inputs["input_ids"] == vlm.anatomy.image_token_id).sum(1)
    if vlm.name == "llava":
        assert visual.tolist() == [16] * 5
    else:
        assert visual.tolist() == (inputs["image_grid_thw"].prod(1) // 4).tolist()
        assert len(set(visual.tolist())) > 2


def test_a_tokenizer_without_padding_pads_with_the_end_token(checkpoint, samples, encode):
    lvlm = svl.load(checkpoint("llama"), device="cpu", name="unpadded")
    lvlm.tokenizer.pad_token = None
    inputs = encode(lvlm, samples.samples)
    assert (inputs["input_ids"][~inputs["attention_mask"].bool()] == lvlm.tokenizer.eos_token_id).all()
