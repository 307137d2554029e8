"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision as llava-hf has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.hub_mimics.files import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    RESCALE,
    UNTIED,
    byte_level,
    sentencepiece_like,
    write_json,
    write_weights,
)

SIDE = 28  # pixels; patches of 14
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLIP_PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN,
    "image_processor_type": "CLIPImageProcessor", "image_std": CLIP_STD, "processor_class": "LlavaProcessor",
    "resample": 3, "rescale_factor": RESCALE, "size": {"shortest_edge": SIDE},
}  # fmt: skip
VICUNA: dict[str, Any] = {  # the number of layers is left to the default, 32
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
    "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "image_size": SIDE, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3,
    "patch_size": 14,
}  # fmt: skip
GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
PROCESSOR = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14}
PROCESSOR |= {"vision_feature_select_strategy": "default"}


def _vicuna_tokenizer(folder: Path, **settings: Any) -> tuple[dict[str, int], int]:
    usual: dict[str, Any] = {"eos_token": "</s>", "legacy": False, "padding_side": "left"}
    usual |= {"tokenizer_class": "LlamaTokenizer"}
    return sentencepiece_like(folder, ("<unk>", "<s>", "</s>"), ("<image>", "<pad>"), "<s>", **usual, **settings)


def llava_15(folder: Path, processor: bool = True, **decoder: Any) -> None:
    """LLaVA-1.5; without a `processor` file as revisions of before 2025, with settings of its decoder's config."""
    ids, n = _vicuna_tokenizer(folder, image_token="<image>", processor_class="LlavaProcessor")
    clip = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 24, "vocab_size": n}
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": ids["<image>"],
        "model_type": "llava", "pad_token_id": ids["<pad>"], "projector_hidden_act": "gelu",
        "text_config": {**VICUNA, "vocab_size": n + 62, **decoder}, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.36.0.dev0", "vision_config": clip,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": n + 62,
    }  # fmt: skip
    generation = {**GENERATION, "pad_token_id": ids["<pad>"], "transformers_version": "4.36.0.dev0"}
    write_json(folder, config=config, generation_config=generation, preprocessor_config=CLIP_PREPROCESSOR)
    write_json(
        folder, chat_template={"chat_template": TEMPLATE}, added_tokens={k: ids[k] for k in ("<image>", "<pad>")}
    )
    if processor:
        write_json(folder, processor_config={**PROCESSOR, "processor_class": "LlavaProcessor"})
    write_weights(folder, torch.float16, UNTIED)


def llava_15_13b(folder: Path) -> None:
    """As the 7B, its depth said."""
    llava_15(folder, num_hidden_layers=8)


def llava_next(folder: Path) -> None:
    """LLaVA-1.6 on Vicuna: tiles of SIDE pixels, two by two at most."""
    ids, n = _vicuna_tokenizer(folder, processor_class="LlavaNextProcessor")
    points = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    clip = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 24, "vocab_size": n}
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100, "image_grid_pinpoints": points,
        "image_token_index": ids["<image>"], "model_type": "llava_next", "projector_hidden_act": "gelu",
        "text_config": {**VICUNA, "pad_token_id": 0, "vocab_size": n + 62}, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.39.0.dev0", "use_image_newline_parameter": True,
        "vision_config": clip, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    images = {
        **CLIP_PREPROCESSOR, "aspect_ratio_setting": "anyres", "image_grid_pinpoints": points,
        "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
    }  # fmt: skip
    generation = {**GENERATION, "pad_token_id": 0, "transformers_version": "4.39.0.dev0"}
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_json(folder, processor_config={**PROCESSOR, "processor_class": "LlavaNextProcessor"})
    write_json(folder, chat_template={"chat_template": TEMPLATE})
    write_weights(folder, torch.float16, UNTIED)


def llava_onevision(folder: Path) -> None:
    """LLaVA-OneVision on Qwen2: SigLIP, tiles, video."""
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "processor_class": "LlavaOnevisionProcessor"}
    ids, n = byte_level(folder, marks, **named)
    start, end = ids["<|endoftext|>"], ids["<|im_end|>"]
    points = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    qwen2 = {
        "_name_or_path": "Qwen/Qwen2-7B-Instruct", "architectures": ["Qwen2ForCausalLM"], "bos_token_id": start,
        "eos_token_id": end, "hidden_size": 64, "intermediate_size": 96, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 8, "num_key_value_heads": 2,
        "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "vocab_size": n + 20,
    }  # fmt: skip
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "ignore_index": -100,
        "image_grid_pinpoints": points, "image_token_index": ids["<image>"], "model_type": "llava_onevision",
        "projector_hidden_act": "gelu", "text_config": qwen2, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.45.0.dev0", "use_image_newline_parameter": True,
        "video_token_index": ids["<video>"], "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }  # fmt: skip
    images = {
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_grid_pinpoints": points, "image_mean": HALF, "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": HALF, "processor_class": "LlavaOnevisionProcessor", "resample": 3, "rescale_factor": RESCALE,
        "size": {"height": SIDE, "width": SIDE},
    }  # fmt: skip
    generation = {
        "bos_token_id": start, "do_sample": True, "eos_token_id": [end, start], "pad_token_id": start,
        "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
    }  # fmt: skip
    processor = {"image_token": "<image>", "num_image_tokens": 4, "processor_class": "LlavaOnevisionProcessor"}
    processor |= {"video_token": "<video>", "vision_feature_select_strategy": "full"}
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_json(folder, processor_config=processor)
    write_json(folder, chat_template={"chat_template": ONEVISION_TEMPLATE})
    write_weights(folder, torch.float16, UNTIED)
