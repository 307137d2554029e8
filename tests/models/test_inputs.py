"""What prompts and pictures become: mixed batches, several pictures, video; and the authors' own preprocessing.

The golden values are computed here, with Pillow and NumPy alone, from what papers and model cards say.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.hub_mimics import MIMICS
from helpers.references import assert_answers_are_unseen, close, logits
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import Tokenizer

import svl
from svl.config import CONF
from svl.core import SvlError
from svl.models.lvlm import Lvlm
from svl.models.prompts import with_prompt_style

CLIP = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
ROUNDING = 2.5 / 255 / 0.225  # libraries round a resized picture differently, by two of 256 levels at most
QUESTION = "What colour is the shape?"
NO_VIDEO_MODELS = ("gemma3_4b", "llava_15_7b", "llava_next_7b", "mplug_owl2", "paligemma2_3b", "qwen_vl_chat")
VIDEO_MODELS = ("internvl3_8b", "llava_onevision_7b", "qwen2_5_vl_7b", "qwen2_vl_7b", "qwen3_vl_8b", "smolvlm2_2b")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blocks of noise."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def hub_model(mimic):
    """A model on files like the hub's, as its file in conf/model has it, in float32."""
    kept: dict[str, Lvlm] = {}

    def of(name: str) -> Lvlm:
        if name not in kept:
            said = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
            lvlm = svl.load(mimic(name), device="cpu", dtype="float32", name=name)
            kept[name] = with_prompt_style(lvlm, said.get("prompt", "chat"), said.get("image_processor"))
        return kept[name]

    return of


# ------------------------------------------------------------------------------------------------- mixed batches


@pytest.mark.column("several_images")
@pytest.mark.parametrize("counts", [(0, 2, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("name", sorted(MIMICS))
def test_a_prompt_in_a_batch_is_what_it_is_alone(hub_model, name, counts):
    lvlm = hub_model(name)
    texts = [lvlm.prompt(QUESTION + " red" * i, n) for i, n in enumerate(counts)]
    images = [[picture(60 - 9 * k, 33 + 8 * i, 5 * i + k) for k in range(n)] for i, n in enumerate(counts)]
    together = lvlm.encode(texts, images)
    exact = copy.deepcopy(lvlm.model).double()  # norms and rotations stay in float32
    scores = logits(exact, together)
    for i, text in enumerate(texts):
        alone = lvlm.encode([text], [images[i]])
        n = alone["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][i, -n:], alone["input_ids"][0])
        assert together["attention_mask"][i].sum() == n
        assert bool(lvlm.is_visual(alone["input_ids"]).any()) == bool(images[i])
        close(scores[i, -n:], logits(exact, alone)[0], 1e-4)


@pytest.mark.parametrize("name", sorted(MIMICS))
def test_no_token_of_an_answer_is_seen_by_those_before_it(hub_model, make_samples, name):
    pictured, (text,) = make_samples([3, 9]), make_samples([5], image=False)
    rows = (*(replace(s, answer=f"{s.answer} of the square") for s in pictured), replace(text, plain=True, answer=""))
    assert_answers_are_unseen(hub_model(name), type(pictured)("random", rows))


def test_only_what_the_model_computes_from_is_kept(hub_model):
    lvlm = hub_model("paligemma2_3b")
    given = lvlm.processor(text=[lvlm.prompt("red", 1)], images=[[picture(30, 30)]], return_tensors="pt")
    assert "labels" in given
    assert "labels" not in lvlm.encode([lvlm.prompt("red", 1)], [[picture(30, 30)]])


def test_images_must_come_in_a_list_for_every_prompt(llava):
    texts = [llava.prompt("red", 1), llava.prompt("red", 1)]
    for wrong in ([picture(9, 9), picture(9, 9)], [[picture(9, 9)]]):
        with pytest.raises(SvlError, match="one list for each of the 2 prompts"):
            llava.encode(texts, wrong)
    with pytest.raises(SvlError, match=r"one list of frames, or None, for each of the 2 prompts"):
        llava.encode(texts, None, [[picture(9, 9)]])
    with pytest.raises(SvlError, match="'llava' takes no videos"):
        llava.encode(texts, None, [[picture(9, 9)], None])


# ----------------------------------------------------------------------------------------------------------- video


@pytest.mark.column("video")
@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_frames_of_a_video_reach_the_model(hub_model, name):
    """Beside a prompt with a picture, one with neither and one with another video; as alone, frame for frame."""
    lvlm = hub_model(name)
    frames = [[picture(60, 40, 10 * v + i) for i in range(4)] for v in range(2)]
    shown = int(name != "smolvlm2_2b")  # which takes no images beside videos
    texts = [lvlm.prompt(QUESTION, shown), lvlm.prompt("Hm?", 0), lvlm.prompt("And?", 0, video=True)]
    texts.append(lvlm.prompt(QUESTION, 0, video=True))
    videos = [None, None, *frames]
    images = [[picture(40, 40)] * shown, [], [], []]
    together = lvlm.encode(texts, images, videos)
    exact = copy.deepcopy(lvlm.model).double()  # norms and rotations stay in float32
    scores = logits(exact, together)
    for i, text in enumerate(texts):
        alone = lvlm.encode([text], [images[i]], [videos[i]])
        n = alone["input_ids"].shape[1]
        assert bool(lvlm.is_visual(alone["input_ids"]).any()) == bool(images[i] or videos[i])
        close(scores[i, -n:], logits(exact, alone)[0], 1e-4)
    other = lvlm.encode(texts, images, [*videos[:3], frames[1][::-1]])
    assert (logits(lvlm.model, other)[3] - scores[3]).abs().max() > 1e-3 * scores.abs().max()
    if not shown:
        with pytest.raises(SvlError, match=f"'{name}' takes no images beside videos in one batch"):
            lvlm.encode(texts, [[], [picture(40, 40)], [], []], videos)
    with pytest.raises(SvlError, match="contains"):
        lvlm.prompt(f"What is {lvlm.tokenizer.convert_ids_to_tokens(lvlm.anatomy.visual_token_ids[-1])}?", 1)


@pytest.mark.column("video")
@pytest.mark.parametrize("name", NO_VIDEO_MODELS)
def test_a_model_without_videos_says_so(hub_model, name, verdict):
    lvlm = hub_model(name)
    assert not lvlm.takes_videos
    with pytest.raises(SvlError, match=f"'{name}' takes no videos: its processor has no part for them"):
        lvlm.encode([lvlm.prompt(QUESTION, 0)], None, [[picture(40, 40)]])
    verdict("none")


# ------------------------------------------------------------------------------------------------- golden inputs


def normalised(image: Image.Image, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """[3, height, width]."""
    return ((np.asarray(image) / 255.0 - mean) / std).transpose(2, 0, 1)


def ids_of(folder, text: str) -> list[int]:
    """By the tokenizers library, from tokenizer.json alone."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def assert_same_pixels(ours: torch.Tensor, golden: np.ndarray) -> None:
    assert ours.shape == golden.shape
    difference = np.abs(ours.numpy() - golden)
    assert difference.max() < ROUNDING
    assert abs(float(ours.sum()) - golden.sum()) < 0.1 * ROUNDING * golden.size
    assert difference.mean() < 0.2 * ROUNDING


@pytest.mark.parametrize("size", [(60, 35), (35, 60), (40, 40)], ids=str)
def test_llava_15_pads_to_a_square_in_the_mean_colour(hub_model, mimic, size):
    """Liu et al. 2023, section 4: padded pictures, 24 x 24 tokens (here 2 x 2), the conversation of Vicuna v1."""
    lvlm, image = hub_model("llava_15_7b"), picture(*size)
    square = Image.new("RGB", (max(size), max(size)), tuple(int(255 * level) for level in CLIP[0]))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    golden = normalised(square.resize((28, 28), Image.Resampling.BICUBIC), *CLIP)
    inputs = lvlm.encode([lvlm.prompt(QUESTION, 1)], [[image]])
    assert_same_pixels(inputs["pixel_values"][0], golden)
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: {'<image>' * 4}\n{QUESTION} ASSISTANT:"
    )
    assert inputs["input_ids"][0].tolist() == ids_of(mimic("llava_15_7b"), text)


@pytest.mark.parametrize("size", [(60, 35), (100, 190), (1500, 1200)], ids=str)
def test_qwen2_5_vl_sees_patches_of_whole_multiples(hub_model, mimic, size):
    """Bai et al. 2025, section 2.1: sides rounded to multiples of 28, 2 x 2 patches of 14 a token, 1,280 at most."""
    lvlm, image = hub_model("qwen2_5_vl_7b"), picture(*size)
    width, height = (28 * round(side / 28) for side in size)
    if width * height > 1280 * 28 * 28:
        shrink = math.sqrt(size[0] * size[1] / (1280 * 28 * 28))
        width, height = (28 * math.floor(side / shrink / 28) for side in size)
    elif width * height < 4 * 28 * 28:
        stretch = math.sqrt(4 * 28 * 28 / (size[0] * size[1]))
        width, height = (28 * math.ceil(side * stretch / 28) for side in size)
    pixels = normalised(image.resize((width, height), Image.Resampling.BICUBIC), *CLIP)
    patches = []
    for top, left in itertools.product(range(0, height, 28), range(0, width, 28)):
        for y, x in itertools.product((0, 14), (0, 14)):
            patch = pixels[:, top + y : top + y + 14, left + x : left + x + 14]
            patches.append(np.stack([patch, patch], 1).reshape(-1))  # a picture counts as two frames
    inputs = lvlm.encode([lvlm.prompt(QUESTION, 1)], [[image]])
    assert inputs["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    assert_same_pixels(inputs["pixel_values"], np.stack(patches))
    tokens = width * height // 28**2
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs["input_ids"][0].tolist() == ids_of(mimic("qwen2_5_vl_7b"), text)


@pytest.mark.parametrize(("size", "tiles"), [((56, 56), (1, 1)), ((200, 60), (3, 1)), ((90, 180), (2, 4)),
                                             ((400, 300), (4, 3))], ids=str)  # fmt: skip
def test_internvl3_cuts_pictures_into_tiles(hub_model, mimic, size, tiles):
    """Chen et al. 2024: tiles in the form nearest to the picture's, 12 at most, and a thumbnail.

    Of equally near forms, the largest whose area is less than twice the picture's.
    """
    lvlm, image, side = hub_model("internvl3_8b"), picture(*size), 56
    columns, rows = tiles
    resized = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    shown = [resized.crop(box) for box in boxes]
    if len(shown) > 1:
        shown.append(image.resize((side, side), Image.Resampling.BICUBIC))
    golden = np.stack([normalised(tile, *IMAGENET) for tile in shown])
    inputs = lvlm.encode([lvlm.prompt(QUESTION, 1)], [[image]])
    assert_same_pixels(inputs["pixel_values"], golden)
    text = (
        f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 4 * len(shown)}</img>\n{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert inputs["input_ids"][0].tolist() == ids_of(mimic("internvl3_8b"), text)
