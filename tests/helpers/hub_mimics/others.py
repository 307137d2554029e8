"""Gemma 3, PaliGemma 2 and SmolVLM2 as their authors have them on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.hub_mimics.files import (
    HALF,
    RESCALE,
    TIED,
    as_stored,
    byte_level,
    sentencepiece_like,
    write_json,
    write_weights,
)

GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}{%- if (message['role'] == 'assistant') -%}"
    "{%- set role = \"model\" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' }}{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}"
    "{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
SIGLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "model_type": "siglip_vision_model", "num_attention_heads": 2,
    "num_hidden_layers": 2, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
HALVES: dict[str, Any] = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": HALF}
HALVES |= {"image_std": HALF, "rescale_factor": RESCALE}


def gemma3(folder: Path) -> None:
    """Gemma 3: pictures of 56 pixels become four tokens; most layers look back a window only."""
    own = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    marks = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
    settings = {
        "tokenizer_class": "GemmaTokenizer", "eos_token": "<eos>", "processor_class": "Gemma3Processor",
        "spaces_between_special_tokens": False, "padding_side": "left",
    }  # fmt: skip
    ids, n = sentencepiece_like(folder, GEMMA_SPECIAL, marks, "<bos>", **settings, **own, extra_special_tokens=own)
    stops = [1, ids["<end_of_turn>"]]
    text = {
        "hidden_size": 32, "intermediate_size": 48, "model_type": "gemma3_text", "num_hidden_layers": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "vocab_size": n,
    }  # fmt: skip
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"], "eos_token_id": stops,
        "image_token_index": ids["<image_soft_token>"], "initializer_range": 0.02, "mm_tokens_per_image": 4,
        "model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "vision_config": {**SIGLIP, "image_size": 56},
    }  # fmt: skip
    images = {
        **HALVES, "do_convert_rgb": None, "do_pan_and_scan": None, "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 4, "pan_and_scan_max_num_crops": None, "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None, "processor_class": "Gemma3Processor", "resample": 2,
        "size": {"height": 56, "width": 56},
    }  # fmt: skip
    generation = {
        "bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": True, "eos_token_id": stops,
        "pad_token_id": 0, "top_k": 64, "top_p": 0.95, "transformers_version": "4.50.0.dev0",
    }  # fmt: skip
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_json(folder, processor_config={"image_seq_length": 4, "processor_class": "Gemma3Processor"})
    write_json(folder, chat_template={"chat_template": GEMMA_TEMPLATE})
    write_weights(folder, torch.bfloat16, TIED)


def paligemma2(folder: Path) -> None:
    """PaliGemma 2: no chat template; its vocabulary has places for more than the tokenizer's words."""
    own = {"image_token": "<image>"}
    settings = {"tokenizer_class": "GemmaTokenizer", "eos_token": "<eos>", "processor_class": "PaliGemmaProcessor"}
    ids, n = sentencepiece_like(
        folder, GEMMA_SPECIAL, ("<image>",), "<bos>", **settings, **own, extra_special_tokens=own
    )
    size = n + 1100
    text = {
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "model_type": "gemma2",
        "num_attention_heads": 2, "num_hidden_layers": 8, "num_image_tokens": 4, "num_key_value_heads": 1,
        "head_dim": 16, "query_pre_attn_scalar": 16, "torch_dtype": "bfloat16", "vocab_size": size,
    }  # fmt: skip
    tower = {**SIGLIP, "image_size": 28, "num_image_tokens": 4, "num_positions": 4, "projection_dim": 32}
    config = {
        "_vocab_size": size, "architectures": ["PaliGemmaForConditionalGeneration"], "bos_token_id": 2,
        "eos_token_id": 1, "hidden_size": 32, "image_token_index": ids["<image>"], "model_type": "paligemma",
        "num_hidden_layers": 8, "pad_token_id": 0, "projection_dim": 32, "text_config": text,
        "torch_dtype": "bfloat16", "transformers_version": "4.47.0.dev0",
        "vision_config": {**tower, "torch_dtype": "bfloat16"},
    }  # fmt: skip
    images = {
        **HALVES, "do_convert_rgb": None, "image_processor_type": "SiglipImageProcessor", "image_seq_length": 4,
        "processor_class": "PaliGemmaProcessor", "resample": 3, "size": {"height": 28, "width": 28},
    }  # fmt: skip
    generation = {
        "_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "pad_token_id": 0, "transformers_version": "4.47.0.dev0",
    }  # fmt: skip
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_weights(folder, torch.bfloat16, TIED)


def smolvlm2(folder: Path) -> None:
    """SmolVLM2: tiles of 56 pixels, two by two at most, and the whole; stored in float32."""
    own = {
        "end_of_utterance_token": "<end_of_utterance>", "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>", "image_token": "<image>",
    }  # fmt: skip
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>")
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)]
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "processor_class": "SmolVLMProcessor",
        "legacy": False, "truncation_side": "left",
    }  # fmt: skip
    named = (*marks, "<image>", "<global-img>", *tiles)
    ids, n = byte_level(folder, named, **settings, **own, extra_special_tokens=own)
    text = {
        "_flash_attn_2_enabled": True, "architectures": ["VLlama3ForCausalLM"], "head_dim": 16, "hidden_size": 64,
        "intermediate_size": 96, "max_position_embeddings": 8192, "model_type": "llama", "neftune_noise_alpha": 0.0,
        "num_attention_heads": 4, "num_hidden_layers": 8, "num_key_value_heads": 4, "pad_token_id": 2,
        "perceiver_config": {"attention_dropout": 0.0, "hidden_act": "silu", "model_type": "vllama3",
                             "num_key_value_heads": 1, "resampler_depth": 6, "resampler_head_dim": 96},
        "pixel_shuffle_factor": 2, "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_theta": 130000,
        "torch_dtype": "bfloat16", "use_resampler": False, "vocab_size": n + 3,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "image_size": 56, "intermediate_size": 48, "max_image_size": {"longest_edge": 56},
        "model_type": "smolvlm_vision", "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14,
        "size": {"longest_edge": 112}, "use_base_siglip": True,
    }  # fmt: skip
    config = {
        "architectures": ["SmolVLMForConditionalGeneration"], "image_token_id": ids["<image>"],
        "model_type": "smolvlm", "pad_token_id": ids["<|im_end|>"], "scale_factor": 2, "text_config": text,
        "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "transformers_version": "4.47.1",
        "use_cache": False, "use_reentrant_checkpointing": False, "vision_config": tower, "vocab_size": n + 3,
    }  # fmt: skip
    images = {
        **HALVES, "do_convert_rgb": True, "do_image_splitting": True, "do_pad": True,
        "image_processor_type": "SmolVLMImageProcessor", "max_image_size": {"longest_edge": 56},
        "processor_class": "SmolVLMProcessor", "resample": 1, "size": {"longest_edge": 112},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 56}},
    }  # fmt: skip
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": ids["<end_of_utterance>"]}
    generation |= {"pad_token_id": ids["<|im_end|>"], "transformers_version": "4.50.0.dev0"}
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_json(folder, processor_config={"image_seq_len": 4, "processor_class": "SmolVLMProcessor"})
    write_json(folder, chat_template={"chat_template": SMOLVLM_TEMPLATE})
    write_weights(folder, torch.float32, as_stored)
