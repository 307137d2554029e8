"""Processors that lack something or are set otherwise, as people's checkpoints have them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.hub_mimics import MIMICS
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm

import svl
from svl.core import SvlError
from svl.models.prompts import with_prompt_style


@pytest.fixture
def edited(mimic, tmp_path):
    """A copy of a mimic, with a JSON file changed (None: removed); loaded in float32."""

    def load(name: str, file: str, **changes):
        folder = shutil.copytree(mimic(name), tmp_path / name)
        content = json.loads((folder / file).read_text())
        for key, value in changes.items():
            content.pop(key) if value is None else content.update({key: value})
        (folder / file).write_text(json.dumps(content))
        return svl.load(folder, device="cpu", dtype="float32", name=f"{name}-edited")

    return load


def tokens_of(lvlm) -> list[int]:
    return lvlm.encode([lvlm.prompt("What colour is it?", 1)], [[Image.new("RGB", (40, 30))]])["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "left_out",
    [
        ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"),
        ("patch_size",),
        ("num_additional_image_tokens",),
        ("vision_feature_select_strategy",),
    ],
    ids=len,
)
@pytest.mark.parametrize("name", ["llava_15_13b", "llava_next_7b"])
def test_llava_processors_learn_from_the_config_what_their_files_do_not_say(mimic, edited, name, left_out):
    whole = svl.load(mimic(name), device="cpu", dtype="float32")
    expected = tokens_of(whole)
    assert tokens_of(edited(name, "processor_config.json", **dict.fromkeys(left_out))) == expected


@pytest.mark.parametrize("name", ["llava_15_7b", "llava_next_7b", "llava_onevision_7b"])
def test_llava_checkpoints_without_a_processor_file_load(mimic, tmp_path, name):
    """As in revisions of before 2025."""
    expected = tokens_of(svl.load(mimic(name), device="cpu", dtype="float32"))
    folder = shutil.copytree(mimic(name), tmp_path / name)
    (folder / "processor_config.json").unlink()
    lvlm = svl.load(folder, device="cpu", dtype="float32", name="bare")
    assert tokens_of(lvlm) == expected
    inputs = lvlm.encode([lvlm.prompt("What?", 1)], [[Image.new("RGB", (40, 30))]])
    with torch.inference_mode():
        assert lvlm.model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_null_is_as_good_as_missing(edited, mimic):
    """As some checkpoints derived from LLaVA have it."""
    lvlm = edited("llava_15_13b", "processor_config.json", num_additional_image_tokens=None)
    folder = mimic("llava_15_13b")
    content = json.loads((folder / "processor_config.json").read_text()) | {"patch_size": None}
    other = shutil.copytree(folder, folder.parent / "null")
    (other / "processor_config.json").write_text(json.dumps(content))
    assert tokens_of(svl.load(other, device="cpu", dtype="float32")) == tokens_of(lvlm)


def test_another_class_of_image_processor_can_be_chosen(mimic):
    lvlm = svl.load(mimic("llava_15_13b"), device="cpu", dtype="float32")
    image = Image.new("RGB", (60, 20), "red")
    prompt = [lvlm.prompt("What?", 1)]
    cropped = lvlm.encode(prompt, [[image]])["pixel_values"]
    settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    padded = with_prompt_style(lvlm, "chat", settings).encode(prompt, [[image]])["pixel_values"]
    assert cropped.var(dim=(2, 3)).max() < 1e-9  # red all over
    assert padded.shape == cropped.shape
    assert padded[0, 0, 0].abs().max() < 0.02  # the mean colour above
    assert torch.equal(with_prompt_style(lvlm, "chat", {**settings, "do_pad": False}).encode(prompt, [[image]])
                       ["pixel_values"], cropped)  # fmt: skip
    for wrong, said in {
        "LlavaImageProcesor": r"'LlavaImageProcesor' is no class of transformers \(did you mean 'LlavaImageProcessor'",
        "CLIPModel": "is no class of transformers",
    }.items():
        with pytest.raises(SvlError, match=said):
            with_prompt_style(lvlm, "chat", {"image_processor_type": wrong})
    with pytest.raises(SvlError, match=r"has no setting 'do_pads' \(did you mean 'do_pad'"):
        with_prompt_style(lvlm, "chat", {"image_processor_type": "LlavaImageProcessor", "do_pads": True})
    with pytest.raises(SvlError, match="has no setting 'do_pads'"):
        with_prompt_style(lvlm, "chat", {"do_pads": True})


def test_text_models_have_no_image_processor_to_set(llama):
    with pytest.raises(SvlError, match="this model has no image processor"):
        with_prompt_style(llama, "chat", {"size": 4})


def test_smolvlm2_names_the_times_of_a_videos_frames(mimic):
    """In words, which the package num2words writes."""
    lvlm = svl.load(mimic("smolvlm2_2b"), device="cpu", name="smolvlm2")
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    inputs = lvlm.encode([lvlm.prompt("What?", 0, video=True)], None, [frames])
    assert "series of three frames" in lvlm.tokenizer.decode(inputs["input_ids"][0])


def test_a_missing_package_is_named_with_the_extra_that_has_it(mimic, monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(SvlError, match=r"needs the package num2words, .*pip install 'svl\[smolvlm\]'"):
        svl.load(mimic("smolvlm2_2b"), device="cpu", name="lacking")


def test_qwen_vl_decodes_spaces_as_they_are(mimic):
    """Its files, saved again by others, ask for clean_up_tokenization_spaces."""
    tokenizer = svl.load(mimic("qwen_vl_chat"), device="cpu").tokenizer
    text = "it 's red , yes ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_paligemma_writes_its_start_where_the_text_starts(mimic):
    """<image>s, <bos>, text, a line's end; without a picture, the same without the first."""
    lvlm = with_prompt_style(svl.load(mimic("paligemma2_3b"), device="cpu"), "paligemma")
    texts = [lvlm.prompt("What is red?", 1), lvlm.prompt("What is red?", 0)]
    inputs = lvlm.encode(texts, [[Image.new("RGB", (9, 9))], []])
    with_image, without = (
        lvlm.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    )
    assert with_image == "<image>" * 4 + without
    assert without == "<bos>answer en What is red?\n"


def test_every_mimic_is_small(mimic):
    assert max(sum(f.stat().st_size for f in mimic(name).iterdir()) for name in MIMICS) < 8 * 2**20
