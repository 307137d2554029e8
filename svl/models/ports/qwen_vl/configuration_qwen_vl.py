"""Configuration of Qwen-VL: the fields of the original `config.json`, under their names."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class QwenVLVisionConfig(PreTrainedConfig):
    """The vision tower and its resampler.

    Attributes:
        width, layers, heads, mlp_ratio: of the transformer; the MLP is int(width * mlp_ratio) wide.
        image_size, patch_size: in pixels; images are squares.
        output_dim: width of the visual tokens, that of the decoder; the resampler has a head per 128.
        n_queries: visual tokens per image, a square number.
        image_start_id: id of `<img>`; those of `</img>` and `<imgpad>` follow.
    """

    model_type = "qwen_vl_vision"
    base_config_key = "visual"

    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    image_size: int = 448
    patch_size: int = 14
    output_dim: int = 4096
    n_queries: int = 256
    image_start_id: int = 151857


@strict
class QwenVLConfig(PreTrainedConfig):
    """A Qwen-VL: decoder fields at the top, the vision tower's under `visual`.

    Attributes:
        intermediate_size: of both halves of the gated MLP together.
        kv_channels: width of a head.
        seq_length: length that the decoder was trained on; beyond, `use_dynamic_ntk` stretches its rotary positions
            and `use_logn_attn` scales its queries.
        no_bias: whether all projections but the fused query, key and value are without bias.

    Raises:
        ValueError: if the fields do not fit each other, or ask for partial rotary positions, which no checkpoint has.
    """

    model_type = "qwen"
    sub_configs = {"visual": QwenVLVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    max_position_embeddings: int = 8192
    seq_length: int = 2048
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    rotary_pct: float = 1.0
    rotary_emb_base: int | float = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names code that comes with original checkpoints and is not needed here
        if not isinstance(self.visual, PreTrainedConfig):
            given = self.visual or {"output_dim": self.hidden_size}
            self.visual = QwenVLVisionConfig(**{k: v for k, v in given.items() if k != "model_type"})
        super().__post_init__(**kwargs)
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"{self.num_attention_heads} heads of kv_channels {self.kv_channels} are not hidden_size "
                f"{self.hidden_size}"
            )
        if self.visual.output_dim != self.hidden_size:
            raise ValueError(f"visual.output_dim {self.visual.output_dim} is not hidden_size {self.hidden_size}")
        if self.rotary_pct != 1:
            raise ValueError(f"rotary_pct is {self.rotary_pct}, but rotary positions must cover whole heads")

    @property
    def image_token_id(self) -> int:
        """Id of `<imgpad>`, which stands where a visual token goes."""
        return self.visual.image_start_id + 2


__all__ = ["QwenVLConfig", "QwenVLVisionConfig"]
