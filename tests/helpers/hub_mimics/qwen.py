"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and InternVL3 as their authors have them on the hub."""

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
    as_stored,
    byte_level,
    renaming,
    write_json,
    write_weights,
)

MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}"
    "{{ '<video>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
DECODER: dict[str, Any] = {
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
    "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 8, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "use_cache": True,
}  # fmt: skip


def _qwen2_config(ids: dict[str, int], size: int) -> dict[str, Any]:
    """Decoder fields at the top, as transformers 4.41 wrote them."""
    return {
        **DECODER, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "max_position_embeddings": 32768, "max_window_layers": 8,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_sliding_window": False, "vocab_size": size + 20,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }  # fmt: skip


def _generation(ids: dict[str, int], **settings: Any) -> dict[str, Any]:
    end = ids["<|endoftext|>"]
    stops = [ids["<|im_end|>"], end]
    return {"bos_token_id": end, "do_sample": True, "eos_token_id": stops, "pad_token_id": end, **settings}


def _qwen2(folder: Path, kind: str, architecture: str, tower: dict[str, Any]) -> None:
    settings = {
        "chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left",
        "additional_special_tokens": list(MARKS[1:]),
    }  # fmt: skip
    ids, n = byte_level(folder, MARKS, **settings)
    whole = {"architectures": [f"{architecture}ForConditionalGeneration"], "model_type": kind}
    whole |= {**_qwen2_config(ids, n), "vision_config": tower}
    images = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{architecture}Processor",
    }  # fmt: skip
    generation = _generation(ids, repetition_penalty=1.05, temperature=0.000001, transformers_version="4.49.0")
    write_json(folder, config=whole, generation_config=generation, preprocessor_config=images)
    write_json(folder, chat_template={"chat_template": TEMPLATE})
    renamed = renaming(("model.language_model.", "model."), ("model.visual.", "visual."))
    write_weights(folder, torch.bfloat16, renamed, shards=3)


def qwen2_vl(folder: Path) -> None:
    """Qwen2-VL."""
    tower = {
        "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": 64,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    }  # fmt: skip
    _qwen2(folder, "qwen2_vl", "Qwen2VL", tower)


def qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL."""
    tower = {
        "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3,
        "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    _qwen2(folder, "qwen2_5_vl", "Qwen2_5_VL", tower)


def qwen3_vl(folder: Path) -> None:
    """Qwen3-VL: three features of its tower are added after the first three decoder layers."""
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ids, n = byte_level(folder, MARKS, **settings)
    text = {
        **DECODER, "attention_bias": False, "bos_token_id": ids["<|endoftext|>"], "dtype": "bfloat16",
        "eos_token_id": ids["<|im_end|>"], "head_dim": 16, "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text", "rope_theta": 5000000, "vocab_size": n + 20,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    }  # fmt: skip
    tower = {
        "deepstack_visual_indexes": [0, 1, 2], "depth": 4, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 48, "model_type": "qwen3_vl",
        "num_heads": 2, "num_position_embeddings": 64, "out_hidden_size": 64, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_vl", "text_config": text, "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0", "video_token_id": ids["<|video_pad|>"], "vision_config": tower,
        "vision_end_token_id": ids["<|vision_end|>"], "vision_start_token_id": ids["<|vision_start|>"],
    }  # fmt: skip
    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": HALF, "image_std": HALF}
    patches |= {"processor_class": "Qwen3VLProcessor"}
    images = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, **patches}
    images |= {"image_processor_type": "Qwen2VLImageProcessorFast"}
    videos = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, **patches}
    videos |= {"video_processor_type": "Qwen3VLVideoProcessor"}
    generation = _generation(ids, top_p=0.8, top_k=20, temperature=0.7, repetition_penalty=1.0)
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_json(folder, chat_template={"chat_template": TEMPLATE}, video_preprocessor_config=videos)
    write_weights(folder, torch.bfloat16, as_stored)


def internvl3(folder: Path) -> None:
    """InternVL3 as the repositories that end in -hf have it: tiles of 56 pixels."""
    own = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    own |= {"video_token": "<video>"}
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "processor_class": "InternVLProcessor"}
    ids, n = byte_level(folder, marks, **settings, **own, extra_special_tokens=own)
    start, end = ids["<|endoftext|>"], ids["<|im_end|>"]
    text = {
        **DECODER, "architectures": ["Qwen2ForCausalLM"], "bos_token_id": start, "eos_token_id": end,
        "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2",
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1000000.0,
        "sliding_window": None, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": n + 20,
    }  # fmt: skip
    tower = {
        "architectures": ["InternVisionModel"], "attention_bias": True, "attention_dropout": 0.0, "dropout": 0.0,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 32, "image_size": [56, 56],
        "initializer_factor": 0.1, "initializer_range": 1e-10, "intermediate_size": 48, "layer_norm_eps": 1e-06,
        "layer_scale_init_value": 0.1, "model_type": "internvl_vision", "norm_type": "layer_norm",
        "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2, "patch_size": [14, 14],
        "projection_dropout": 0.0, "torch_dtype": "bfloat16", "use_absolute_position_embeddings": True,
        "use_mask_token": False, "use_mean_pooling": True, "use_qk_norm": False,
    }  # fmt: skip
    config = {
        "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 4,
        "image_token_id": ids["<IMG_CONTEXT>"], "model_type": "internvl", "projector_hidden_act": "gelu",
        "text_config": text, "torch_dtype": "bfloat16", "transformers_version": "4.52.0.dev0",
        "vision_config": tower, "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    images = {
        "crop_size": None, "crop_to_patches": False, "data_format": "channels_first", "default_to_square": True,
        "device": None, "do_center_crop": None, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "GotOcr2ImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225], "input_data_format": None, "max_patches": 12, "min_patches": 1,
        "processor_class": "InternVLProcessor", "resample": 3, "rescale_factor": RESCALE, "return_tensors": None,
        "size": {"height": 56, "width": 56},
    }  # fmt: skip
    generation = {"_from_model_config": True, "bos_token_id": start, "eos_token_id": end}
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_json(folder, processor_config={"image_seq_length": 4, "processor_class": "InternVLProcessor"})
    (folder / "chat_template.jinja").write_text(INTERN_TEMPLATE)
    write_weights(folder, torch.bfloat16, UNTIED)
