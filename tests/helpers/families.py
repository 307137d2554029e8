"""A tiny random model of every supported family, with a real image input: what the family tests are run on.

`FAMILIES[name]()` builds a `Family` (once per process). Adding a family means adding one function here, and an entry to
the tables of `svl.loading` and `svl.surgery` if structure does not tell all. Decoders have 6 layers of width 32 unless
their kind of layer needs more; weights are large enough that attention is uneven and every layer is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Phi4MultimodalConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

import svl.models.ports  # noqa: F401 # makes its models known
from svl.core import Plan
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm

VOCABULARY, IMAGE, VIDEO, START, END = 64, 60, 61, 62, 63  # the last ones mark images; ordinary words are below 50
DEPTH, WIDTH = 6, 32

# Text decoders, by the names that their configs use.
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {**LLAMA, "num_key_value_heads": 4}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

# Vision towers: 16 pixels in patches of 4, two layers of width 16 unless said.
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = CLIPVisionConfig(**TOWER, image_size=16, patch_size=4, projection_dim=16)
SIGLIP = SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False)
QWEN_TOWER = {
    "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "out_hidden_size": WIDTH, "in_channels": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model in evaluation mode, inputs of one sample (an image, unless text only), and its placeholder token."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    image_token_id: int | None = IMAGE


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Large random weights: attention is uneven, gates are open, no bias or norm is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                fan_in = p.shape[-1] if p.ndim > 3 or "expert" not in name else p.shape[-2]
                scale = 1.0 if "embed" in name else fan_in**-0.5
                p.copy_(noise * scale * (2 if "q_proj" in name or "k_proj" in name else 1))
            else:
                p.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
    return model.eval().requires_grad_(False)


def build(
    config: Any, visual: int = 0, pictures: dict[str, Tensor] | None = None, auto: Any = AutoModelForImageTextToText
) -> Family:
    """A model of `config` and a prompt of `visual` placeholders between words, with its `pictures`."""
    words = torch.randint(5, 50, (14,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = torch.tensor([[1, *words[:4], *[IMAGE] * visual, *words[4:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **(pictures or {})}
    return Family(randomise(auto.from_config(config)), inputs, IMAGE if pictures else None)


def pixels(*shape: int) -> Tensor:
    """A picture."""
    return torch.rand(shape or (1, 3, 16, 16), generator=torch.Generator().manual_seed(2))


def config(kind: str, **fields: Any) -> Any:
    """The config of a model type."""
    return AutoConfig.for_model(kind, **fields)


def text(kind: str, **fields: Any) -> Family:
    """A text-only family."""
    return build(config(kind, **{**LLAMA, **fields}), auto=AutoModelForCausalLM)


def plain(
    kind: str, decoder: Any, tower: Any, visual: int, *, token: str = "image_token_index", **fields: Any
) -> Family:
    """A LLaVA-like family: a tower of 16-pixel pictures, a projector, a decoder."""
    picture = {"pixel_values": fields.pop("pixel_values", pixels())}
    picture |= fields.pop("pictures", {})
    return build(config(kind, text_config=decoder, vision_config=tower, **{token: IMAGE}, **fields), visual, picture)


def grid(kind: str, tower: dict[str, Any], decoder: dict[str, Any], **fields: Any) -> Family:
    """A family of the Qwen-VL kind: flattened patches with a grid, three-dimensional positions. 4 x 6 patches."""
    patches, merged = 4 * 6, 2 * 3
    side = tower.get("patch_size", 4)
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, **fields}
    family = build(
        config(kind, text_config=decoder, vision_config=tower, **marks), merged,
        {"pixel_values": pixels(patches, 3 * 2 * side * side), "image_grid_thw": torch.tensor([[1, 4, 6]])},
    )  # fmt: skip
    family.inputs["mm_token_type_ids"] = (family.inputs["input_ids"] == IMAGE).int()
    return family


FAMILIES: dict[str, Callable[[], Family]] = {}


def family(make: Callable[[], Family]) -> Callable[[], Family]:
    """Enter a builder under its name."""
    FAMILIES[make.__name__] = cache(make)
    return make


# ---------------------------------------------------------------------------------------------- LLaVA-like


@family
def llava() -> Family:
    return plain("llava", config("llama", **LLAMA), CLIP, 16, image_seq_length=16)


@family
def llava_next() -> Family:
    """Two crops; 16 base tokens and 4 x 4 unpadded ones with a newline each."""
    sizes = {"pixel_values": pixels(1, 2, 3, 16, 16), "pictures": {"image_sizes": torch.tensor([[16, 16]])}}
    return plain("llava_next", config("mistral", **LLAMA), CLIP, 36, image_grid_pinpoints=[[16, 16]], **sizes)


@family
def llava_onevision() -> Family:
    sizes = {"pixel_values": pixels(1, 2, 3, 16, 16), "pictures": {"image_sizes": torch.tensor([[16, 16]])}}
    decoder = config("qwen2", **LLAMA)
    return plain(
        "llava_onevision", decoder, SIGLIP, 36, image_grid_pinpoints=[[16, 16]], video_token_index=VIDEO, **sizes
    )


@family
def vipllava() -> Family:
    return plain("vipllava", config("llama", **LLAMA), CLIP, 16, vision_feature_layers=[0, -1])


@family
def internvl() -> Family:
    tower = {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}
    return plain("internvl", config("qwen2", **LLAMA), tower, 4, token="image_token_id", image_seq_length=4)


@family
def mistral3() -> Family:
    tower = config("pixtral", **TOWER, image_size=16, patch_size=4, head_dim=8)
    picture = {"image_sizes": torch.tensor([[16, 16]])}
    return plain("mistral3", config("mistral", **LLAMA, sliding_window=9), tower, 4, pictures=picture)


@family
def pixtral() -> Family:
    """Pixtral is a LLaVA with a tower of its own."""
    tower = config("pixtral", **TOWER, image_size=16, patch_size=4, head_dim=8)
    picture = {"image_sizes": torch.tensor([[16, 16]])}
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return plain("llava", config("mistral", **LLAMA), tower, 16, pictures=picture, **options)


@family
def aya_vision() -> Family:
    return plain("aya_vision", config("cohere2", **LLAMA, sliding_window=9, layer_types=MIXED), SIGLIP, 4)


@family
def cohere2_vision() -> Family:
    decoder = config("cohere2", **LLAMA, sliding_window=9, layer_types=MIXED)
    return plain("cohere2_vision", decoder, SIGLIP, 4, token="image_token_id", alignment_intermediate_size=24)


@family
def ovis2() -> Family:
    tower = {**TOWER, "image_size": 16, "patch_size": 4, "vocab_size": 20, "hidden_stride": 2}
    fields = {"visual_indicator_token_ids": [51, 52, 53, 54, 55], "hidden_size": WIDTH, "vocab_size": VOCABULARY}
    return plain("ovis2", config("qwen2", **LLAMA), tower, 4, token="image_token_id", **fields)


@family
def perception_lm() -> Family:
    """A tower of timm."""
    from transformers import TimmWrapperConfig  # here, since timm takes seconds to import

    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [16, 16], "patch_size": 4, "global_pool": ""}
    tower = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, initializer_range=0.02)
    tower.num_features = tower.hidden_size = 16
    fields = {"projector_pooling_ratio": 2, "video_token_id": VIDEO, "pixel_values": pixels(1, 1, 3, 16, 16)}
    return plain("perception_lm", config("llama", **LLAMA), tower, 4, token="image_token_id", **fields)


@family
def fast_vlm() -> Family:
    """A convolutional tower of timm."""
    from transformers import TimmWrapperConfig

    tower = TimmWrapperConfig(architecture="test_resnet", initializer_range=0.02)
    tower.num_features = tower.hidden_size = 96
    return plain("fast_vlm", config("qwen2", **LLAMA), tower, 4, pixel_values=pixels(1, 3, 64, 64))


@family
def mplug_owl2() -> Family:
    """A port of svl: visual tokens have keys, values and norms of their own."""
    tower = {**TOWER, "image_size": 16, "patch_size": 4}
    abstractor = {**TOWER, "encoder_hidden_size": 16, "num_learnable_queries": 5, "grid_size": 4}
    visual = {"visual_model": tower, "visual_abstractor": abstractor}
    return build(
        config("mplug_owl2", **LLAMA, visual_config=visual, image_token_index=IMAGE), 6, {"pixel_values": pixels()}
    )


@family
def deepseek_vl() -> Family:
    return plain("deepseek_vl", config("llama", **LLAMA), SIGLIP, 16, token="image_token_id")


@family
def janus() -> Family:
    tower = {
        **TOWER,
        "image_size": 16,
        "patch_size": 4,
        "mlp_ratio": 1.5,
        "projection_dim": WIDTH,
        "num_image_tokens": 16,
    }
    vq = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "num_patches": 4, "projection_dim": WIDTH, "image_token_embed_dim": WIDTH,
    }  # fmt: skip
    return plain("janus", config("llama", **LLAMA), tower, 16, token="image_token_id", vq_config=vq)


@family
def idefics2() -> Family:
    perceiver = {"hidden_size": WIDTH, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 2,
                 "resampler_head_dim": 8, "num_key_value_heads": 1}  # fmt: skip
    picture = {"pixel_values": pixels(1, 1, 3, 16, 16), "perceiver_config": perceiver}
    tower = {**TOWER, "image_size": 16, "patch_size": 4}
    return plain("idefics2", config("mistral", **LLAMA), tower, 5, token="image_token_id", **picture)


@family
def idefics3() -> Family:
    tower = {**TOWER, "image_size": 16, "patch_size": 4}
    picture = {"pixel_values": pixels(1, 1, 3, 16, 16)}
    return plain("idefics3", config("llama", **LLAMA), tower, 4, token="image_token_id", scale_factor=2, **picture)


@family
def smolvlm() -> Family:
    tower = {**TOWER, "image_size": 16, "patch_size": 4}
    picture = {"pixel_values": pixels(1, 1, 3, 16, 16)}
    return plain("smolvlm", config("llama", **LLAMA), tower, 4, token="image_token_id", scale_factor=2, **picture)


@family
def paligemma() -> Family:
    """Every token of the prompt sees every other one."""
    family = plain("paligemma", config("gemma", **LLAMA), SIGLIP, 16, projection_dim=WIDTH)
    family.inputs["token_type_ids"] = torch.zeros_like(family.inputs["input_ids"])
    return family


@family
def paligemma2() -> Family:
    decoder = config("gemma2", **LLAMA, sliding_window=9, layer_types=MIXED, query_pre_attn_scalar=8)
    family = plain("paligemma", decoder, SIGLIP, 16, projection_dim=WIDTH)
    family.inputs["token_type_ids"] = torch.zeros_like(family.inputs["input_ids"])
    return family


@family
def gemma3() -> Family:
    """Tokens of an image see each other."""
    decoder = {**LLAMA, "sliding_window": 9, "layer_types": MIXED, "query_pre_attn_scalar": 8}
    family = plain("gemma3", decoder, SIGLIP, 4, mm_tokens_per_image=4)
    family.inputs["token_type_ids"] = (family.inputs["input_ids"] == IMAGE).int()
    return family


@family
def gemma3n() -> Family:
    decoder = {**LLAMA, "num_hidden_layers": 8, "intermediate_size": [48] * 8, "sliding_window": 9,
               "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2, "num_kv_shared_layers": 3, "laurel_rank": 4,
               "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2,
               "activation_sparsity_pattern": [0.5, 0.5, *[0.0] * 6]}  # fmt: skip
    tower = {"architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 4, "vocab_offset": 60}
    audio = {"hidden_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "vocab_size": 4,
             "vocab_offset": 66, "sscp_conv_channel_size": [4, 4], "input_feat_size": 16}  # fmt: skip
    decoder |= {"vocab_size": 72}
    fields = {"audio_config": audio, "vision_soft_tokens_per_image": 4, "audio_token_id": 70, "boa_token_id": 71}
    return plain("gemma3n", decoder, tower, 4, token="image_token_id", pixel_values=pixels(1, 3, 64, 64), **fields)


@family
def gemma4() -> Family:
    decoder = {**LLAMA, "num_hidden_layers": 8, "sliding_window": 9, "global_head_dim": 16,
               "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2, "num_kv_shared_layers": 3,
               "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}  # fmt: skip
    tower = {**TOWER, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2, "patch_size": 4,
             "position_embedding_size": 64}  # fmt: skip
    places = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
    picture = {"pixel_values": pixels(1, 16, 48), "pictures": {"image_position_ids": places}}
    return plain("gemma4", decoder, tower, 4, token="image_token_id", video_token_id=VIDEO, **picture)


@family
def lfm2_vl() -> Family:
    """Convolutions and attention."""
    decoder = config(
        "lfm2", **{**LLAMA, "layer_types": ["conv", FULL, "conv", FULL, "conv", FULL]}, block_auto_adjust_ff_dim=False
    )
    tower = config("siglip2_vision_model", **TOWER, patch_size=4, num_patches=16, vision_use_head=False)
    picture = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16).int()}
    fields = {"pixel_values": pixels(1, 16, 48), "pictures": picture, "projector_hidden_size": 24}
    return plain("lfm2_vl", decoder, tower, 4, token="image_token_id", **fields)


@family
def llama4() -> Family:
    """Experts in every second layer, chunked attention, rotary positions in some layers."""
    decoder = {**LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 3, "num_experts_per_tok": 1,
               "moe_layers": [1, 3, 5], "attention_chunk_size": 16,
               "layer_types": ["chunked_attention", FULL] * 3, "no_rope_layers": [1, 0, 1, 0, 1, 0]}  # fmt: skip
    tower = {**TOWER, "image_size": 16, "patch_size": 4, "vision_output_dim": 24, "pixel_shuffle_ratio": 0.5,
             "projector_input_dim": 24, "projector_output_dim": 24, "intermediate_size": 64}  # fmt: skip
    return plain("llama4", decoder, tower, 4)


@family
def aria() -> Family:
    decoder = {**LLAMA, "intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2}
    tower = config("idefics3_vision", **TOWER, image_size=980, patch_size=70)  # what its processor always gives
    picture = {"pixel_values": pixels(1, 3, 980, 980), "projector_patch_to_query_dict": {196: 5}}
    return plain("aria", decoder, tower, 5, **picture)


@family
def mllama() -> Family:
    """Vision enters by cross-attention in two layers; the prompt has one mark."""
    decoder = {**{k: v for k, v in LLAMA.items() if k != "head_dim"}, "cross_attention_layers": [1, 4],
               "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1,
             "attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 1,
             "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0],
             "vision_output_dim": 32}  # fmt: skip
    family = plain("mllama", decoder, tower, 1, pixel_values=pixels(1, 1, 1, 3, 16, 16))
    length = family.inputs["input_ids"].shape[1]
    family.inputs["aspect_ratio_ids"], family.inputs["aspect_ratio_mask"] = (
        torch.ones(1, 1).int(),
        torch.ones(1, 1, 1).int(),
    )
    family.inputs["cross_attention_mask"] = (torch.arange(length) >= 5).int().reshape(1, length, 1, 1)
    return family


# --------------------------------------------------------------------------------------------- Qwen-VL-like


@family
def qwen2_vl() -> Family:
    tower = {k: v for k, v in QWEN_TOWER.items() if k not in ("out_hidden_size", "intermediate_size")}
    tower |= {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    decoder = {
        **LLAMA,
        "rope_parameters": MROPE,
        "sliding_window": 9,
        "use_sliding_window": True,
        "max_window_layers": 2,
    }
    return grid("qwen2_vl", tower, decoder, vision_start_token_id=START, vision_end_token_id=END)


@family
def qwen2_5_vl() -> Family:
    tower = {**QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]}
    decoder = {**LLAMA, "rope_parameters": MROPE}
    return grid("qwen2_5_vl", tower, decoder, vision_start_token_id=START, vision_end_token_id=END)


@family
def qwen3_vl() -> Family:
    tower = {**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    decoder = {**LLAMA, "rope_parameters": MROPE}
    return grid("qwen3_vl", tower, decoder, vision_start_token_id=START, vision_end_token_id=END)


@family
def qwen3_vl_moe() -> Family:
    tower = {**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [1]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 2,
               "mlp_only_layers": [3]}  # fmt: skip
    decoder = {**LLAMA, **experts, "rope_parameters": MROPE}
    return grid("qwen3_vl_moe", tower, decoder, vision_start_token_id=START, vision_end_token_id=END)


@family
def qwen3_5() -> Family:
    """Linear and full attention."""
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
              "linear_num_value_heads": 4, "linear_conv_kernel_dim": 2,
              "layer_types": ["linear_attention", FULL, "linear_attention"] * 2}  # fmt: skip
    rope = {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True}
    tower = {**QWEN_TOWER, "num_position_embeddings": 16}
    decoder = {**LLAMA, **linear, "rope_parameters": rope}
    return grid("qwen3_5", tower, decoder, vision_start_token_id=START, vision_end_token_id=END)


@family
def glm4v() -> Family:
    tower = {**QWEN_TOWER, "image_size": 16}
    decoder = {
        **{k: v for k, v in LLAMA.items() if k != "head_dim"},
        "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
    }
    marks = {
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": 58,
        "video_end_token_id": 59,
    }
    return grid("glm4v", tower, decoder, **marks)


# --------------------------------------------------------------------------------------------------- others


def phi4(side: int, visual: int) -> Family:
    """Phi-4 with pictures of so many pixels a side, `visual` tokens each."""
    vision = {**TOWER, "image_size": side, "patch_size": 4, "crop_size": side, "image_token_id": IMAGE,
              "num_hidden_layers": 3}  # fmt: skip
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
             "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "input_size": 16,
             "nemo_conv_channels": 8, "audio_token_id": VIDEO, "feature_layer": -1}  # fmt: skip
    length = max(256, 8 * visual)
    sizes = {**{k: v for k, v in LLAMA.items() if k != "head_dim"}, "max_position_embeddings": length}
    whole = Phi4MultimodalConfig(
        **sizes, original_max_position_embeddings=length, vision_config=vision, audio_config=audio
    )
    pictures = {
        "image_pixel_values": pixels(1, 2, 3, side, side), "image_sizes": torch.tensor([[side, side]]),
        "image_attention_mask": torch.ones(1, 2, side // 4, side // 4).int(),
    }  # fmt: skip
    return build(whole, visual, pictures, AutoModelForCausalLM)


@family
def phi4_multimodal() -> Family:
    """One config for text and all; 2 x 2 tokens of the picture and of its only crop, ends of lines, a separator."""
    return phi4(16, 13)


@family
def molmo2() -> Family:
    decoder = {**LLAMA, "additional_vocab_size": 2, "rope_scaling_layers": [0, 3, 4],
               "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
                                   "original_max_position_embeddings": 8}}  # fmt: skip
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    tower = {**sizes, "num_hidden_layers": 2, "image_size": [16, 16], "patch_size": 4, "num_position_embeddings": 16}
    adapter = {**sizes, "vision_feature_layer": [-1, 0], "text_hidden_size": WIDTH}
    pooling = torch.tensor([[4 * y + x, 4 * y + x + 1, 4 * y + x + 4, 4 * y + x + 5] for y in (0, 2) for x in (0, 2)])
    pictures = {"image_token_pooling": pooling, "image_grids": torch.tensor([[2, 2, 0, 0]])}
    family = plain(
        "molmo2", decoder, tower, 4, token="image_patch_id", adapter_config=adapter, pixel_values=pixels(1, 16, 48),
        pictures=pictures, image_start_token_id=START, image_end_token_id=END,
    )  # fmt: skip
    family.inputs["mm_token_type_ids"] = (family.inputs["input_ids"] == IMAGE).int()
    return family


@family
def fuyu() -> Family:
    """No tower: patches are embedded."""
    decoder = config("persimmon", **{k: v for k, v in MHA.items() if k != "head_dim"}, qk_layernorm=True)
    fields = {"image_size": 16, "patch_size": 4, "image_token_id": IMAGE}
    return build(config("fuyu", text_config=decoder, **fields), 16, {"pixel_values": pixels(1, 16, 48)})


@family
def kosmos2_5() -> Family:
    """Image embeddings go where a mask says; the placeholder is a word as any other."""
    decoder = {"vocab_size": VOCABULARY, "embed_dim": WIDTH, "layers": DEPTH, "ffn_dim": 48, "attention_heads": 4,
               "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    tower = {"hidden_size": 16, "patch_embed_hidden_size": 12, "intermediate_size": 24, "head_dim": 8,
             "num_hidden_layers": 2, "num_attention_heads": 2, "max_num_patches": 4096}  # fmt: skip
    numbered = torch.cat([torch.arange(16).reshape(16, 1) // 4 + 1, torch.arange(16).reshape(16, 1) % 4 + 1], 1)
    patches = torch.cat([numbered.float()[None], pixels(1, 16, 12)], 2)
    family = build(
        config("kosmos-2.5", text_config=decoder, vision_config=tower, latent_query_num=5), 5,
        {"flattened_patches": patches},
    )  # fmt: skip
    family.inputs["image_embeds_position_mask"] = (family.inputs["input_ids"] == IMAGE).int()
    return family


OPT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": DEPTH,
       "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH, "pad_token_id": 0,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
QFORMER = {**TOWER, "vocab_size": VOCABULARY, "encoder_hidden_size": 16, "max_position_embeddings": 64,
           "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


@family
def blip2() -> Family:
    tower = {**TOWER, "image_size": 16, "patch_size": 4}
    fields = {"qformer_config": QFORMER, "num_query_tokens": 5, "image_text_hidden_size": 16}
    return plain("blip-2", config("opt", **OPT), tower, 5, **fields)


@family
def instructblip() -> Family:
    """The Q-Former reads the instruction, too."""
    tower = {**TOWER, "image_size": 16, "patch_size": 4}
    instruction = torch.tensor([[5, 9, 7]])
    picture = {"qformer_input_ids": instruction, "qformer_attention_mask": torch.ones_like(instruction)}
    fields = {"qformer_config": QFORMER, "num_query_tokens": 5, "pictures": picture}
    return plain("instructblip", config("opt", **OPT), tower, 5, **fields)


# ------------------------------------------------------------------------------------------------ text only


@family
def llama() -> Family:
    return text("llama", attention_bias=True, mlp_bias=True)


@family
def qwen2() -> Family:
    return text("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=3)


@family
def qwen3() -> Family:
    return text("qwen3")


@family
def gemma2() -> Family:
    return text("gemma2", sliding_window=9, layer_types=MIXED, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)


@family
def gemma3_text() -> Family:
    return text("gemma3_text", sliding_window=9, layer_types=MIXED, query_pre_attn_scalar=8)


@family
def mistral() -> Family:
    return text("mistral", sliding_window=9)


# ------------------------------------------------------------------------------------------ what is supported


# Families that cannot be supported, and the one error that says why.
REFUSED = {"gemma3n": "layers of gemma3n_text cannot be removed: its layers pass on several hidden states at once"}
# Layers of linear attention or convolution have no map, nor has cross-attention over the tokens.
MAPLESS = {"qwen3_5": "layers [0, 2, 3, 5] have no attention map", "lfm2_vl": "layers [0, 2, 4] have no attention map",
           "mllama": "cross-attention layers of mllama_text_model have no map"}  # fmt: skip
POST_NORM = {"paligemma2", "gemma3", "gemma4", "glm4v", "gemma2", "gemma3_text"}
SUPPORTED = [name for name in FAMILIES if name not in REFUSED]
ORDINARY = [t for t in range(VOCABULARY) if not 5 <= t < 50]  # suppressed: tokens that are not ordinary words

every = pytest.mark.parametrize("family", SUPPORTED)


def lvlm_of(family: str) -> tuple[Lvlm, Family]:
    made = FAMILIES[family]()
    return Lvlm(made.model, None, find_anatomy(made.model, image_token=made.image_token_id), family), made


def plans(lvlm: Lvlm) -> list[Plan]:
    """First, last, two in a row, every second, all but one of the removable layers."""
    n, free = lvlm.anatomy.n_layers, lvlm.anatomy.removable
    return [Plan(n, r) for r in dict.fromkeys([free[:1], free[-1:], free[1:3], free[::2], free[1:]])]


def generate(model, inputs, use_cache: bool = True) -> tuple[Tensor, Tensor]:
    """Five words, and the logits of every step."""
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=ORDINARY, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits)
