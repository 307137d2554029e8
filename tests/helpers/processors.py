"""Processors of further families, of transformers' own classes, with a tokenizer of a few words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    "<boi>", "<eoi>", "<boa>", "<eoa>", "<audio>", "<|video|>", "<|image|>", "<|python_tag|>",
    "<|image_start|>", "<|image_end|>",
    "<|img_thumbnail|>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    *(f"<|img_row_{i}_col_{j}|>" for i in range(1, 4) for j in range(1, 4)),
)  # fmt: skip
WORDS = "what colour is the shape red green blue"


def tokenizer(image_token: str = "<image>", **special: str) -> Any:
    """Words and marks of all families; `special` are further tokens that a processor reads by their names."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=list(SPECIAL[4:]),
    )  # fmt: skip
    made._set_model_specific_special_tokens({"image_token": image_token, **special})
    mark = "{% if part['type'] == 'image' %}" + image_token + "{% else %}{{ part['text'] }}{% endif %}"
    made.chat_template = f"{{% for m in messages %}}{{% for part in m['content'] %}}{mark}{{% endfor %}}{{% endfor %}}"
    return made


def aria() -> Any:
    words = tokenizer()
    images = transformers.AriaImageProcessor(max_image_size=490)
    return transformers.AriaProcessor(
        images, words, chat_template=words.chat_template, size_conversion={490: 4, 980: 16}
    )


def gemma4() -> Any:
    audio = {"boa_token": "<boa>", "eoa_token": "<eoa>", "audio_token": "<audio>"}
    words = tokenizer(boi_token="<boi>", eoi_token="<eoi>", **audio)
    images = transformers.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    return transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        images,
        words,
        transformers.Gemma4VideoProcessor(),
        chat_template=words.chat_template,
    )


def idefics2() -> Any:
    words = tokenizer(image_boundary_token="<fake_token_around_image>")
    images = transformers.Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56})
    return transformers.Idefics2Processor(images, words, image_seq_len=4, chat_template=words.chat_template)


def idefics3() -> Any:
    words = tokenizer()
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    images = transformers.Idefics3ImageProcessor(**sizes)
    return transformers.Idefics3Processor(images, words, image_seq_len=4, chat_template=words.chat_template)


def lfm2_vl() -> Any:
    words = tokenizer()
    images = transformers.Lfm2VlImageProcessor(tile_size=64, min_image_tokens=1, max_image_tokens=8)
    return transformers.Lfm2VlProcessor(images, words, chat_template=words.chat_template)


def mllama() -> Any:
    words = tokenizer("<|image|>")
    images = transformers.MllamaImageProcessor(size={"height": 28, "width": 28})
    return transformers.MllamaProcessor(images, words, chat_template=words.chat_template)


PROCESSORS: dict[str, Callable[[], Any]] = {
    make.__name__: make for make in (aria, gemma4, idefics2, idefics3, lfm2_vl, mllama)
}
