"""Qwen-VL-Chat and mPLUG-Owl2 as their authors have them on the hub: code beside them, and weights in pickles only."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from helpers.hub_mimics.files import CLIP_MEAN, CLIP_STD, as_stored, write_json, write_weights
from helpers.paths import ROOT

REMOTE_CODE = "raise SystemExit('remote code ran')\n"
OWL_FILES = ROOT / "tests" / "models" / "ports" / "golden" / "mplug_owl2"  # a small vocabulary of SentencePiece
OWL_VOCABULARY = 700


def qwen_vl_chat(folder: Path) -> None:
    """Qwen-VL-Chat: tokenizer files as people saved them again, which ask for spaces to be cleaned up."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*(bytes([i]) for i in range(256)), b"in", b"re", b"ed", b" the"]
    lines = (base64.b64encode(word) + f" {i}\n".encode() for i, word in enumerate(words))
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    end = len(words)  # <|endoftext|>, before 207 more control tokens, four marks of boxes and two of quads
    image_start = end + 208 + 6
    visual = {
        "heads": 2, "image_size": 28, "image_start_id": image_start, "layers": 2, "mlp_ratio": 2.0, "n_queries": 4,
        "output_dim": 128, "patch_size": 14, "width": 32,
    }  # fmt: skip
    config = {
        "_name_or_path": "./", "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"
        },
        "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 128,
        "initializer_range": 0.02, "intermediate_size": 192, "kv_channels": 32, "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 8192, "model_type": "qwen", "no_bias": True, "num_attention_heads": 4,
        "num_hidden_layers": 8, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "scale_attn_weights": True, "seq_length": 2048, "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer", "torch_dtype": "bfloat16", "transformers_version": "4.31.0",
        "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": False, "use_logn_attn": True,
        "visual": visual, "vocab_size": image_start + 10,
    }  # fmt: skip
    generation = {
        "chat_format": "chatml", "do_sample": True, "eos_token_id": end, "max_new_tokens": 512,
        "max_window_size": 6144, "pad_token_id": end, "top_k": 0, "top_p": 0.3, "transformers_version": "4.31.0",
    }  # fmt: skip
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "clean_up_tokenization_spaces": True, "model_max_length": 8192, "padding_side": "right",
        "tokenizer_class": "QWenTokenizer",
    }  # fmt: skip
    write_json(folder, config=config, generation_config=generation, tokenizer_config=tokenizer)
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen", "visual"):
        (folder / f"{name}.py").write_text(REMOTE_CODE)
    (folder / "SimSun.ttf").write_bytes(b"font")
    write_weights(folder, torch.bfloat16, as_stored, shards=3, pickled=True)


def mplug_owl2(folder: Path) -> None:
    """mPLUG-Owl2: CLIP's preprocessor as of 2023, LLaMA's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes((OWL_FILES / "tokenizer.model").read_bytes())
    config: dict[str, Any] = json.loads((OWL_FILES / "config.json").read_text())
    config |= {
        "architectures": ["MPLUGOwl2LlamaForCausalLM"], "freeze_vision_model": False, "num_hidden_layers": 8,
        "image_aspect_ratio": "pad", "torch_dtype": "bfloat16", "transformers_version": "4.31.0",
        "tune_visual_abstractor": True, "vocab_size": OWL_VOCABULARY,
        "auto_map": {"AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config"},
    }  # fmt: skip
    images = {
        "crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "resample": 3, "size": 28,
    }  # fmt: skip
    tokenizer = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.31.0"}
    write_json(folder, config=config, generation_config=generation, preprocessor_config=images)
    write_json(folder, tokenizer_config=tokenizer)
    (folder / "configuration_mplug_owl2.py").write_text(REMOTE_CODE)
    write_weights(folder, torch.bfloat16, as_stored, shards=3, pickled=True)
