"""Qwen-VL: a Qwen-7B decoder that reads 256 tokens per image, which a resampler makes of a ViT-bigG-like tower's.

Parameters have the names of the original checkpoints, so that these load as they are and exports keep their layout.
B, T, K and H are batch, tokens, keys and heads; d is `hidden_size`, w the tower's width, P its patches, Q its queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, eager_attention_forward, rotate_half
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from svl.models.devices import fp64_device
from svl.models.ports.qwen_vl.configuration_qwen_vl import QwenVLConfig, QwenVLVisionConfig

POSITIONS = 256  # rows of the tower's table of positions, at any image size
HEAD = 128  # width of a head of the resampler


@dataclass
class QwenVLOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and `image_hidden_states` [images, Q, d] if there were images."""

    image_hidden_states: Tensor | None = None


def attention(module: nn.Module, config: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Output [B, T, H, head] (and map, if it is made) of the attention that `config` names; inputs [B, H, T, head]."""
    attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    return attend(module, query, key, value, scaling=query.shape[-1] ** -0.5, dropout=0.0, **options)


def resized(table: Tensor, n: int) -> Tensor:
    """A table of positions [side * side, width], bicubically resized to `n` (a square) rows."""
    side, wanted = math.isqrt(len(table)), math.isqrt(n)
    if side == wanted:
        return table
    grid = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def sincos_2d(side: int, width: int) -> Tensor:
    """Sine-cosine positions [side * side, width]: columns in the first half of the width, rows in the second."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1).float()


# ------------------------------------------------------------------------------------------------- vision


class QwenVLVisionAttention(nn.Module):
    """Bidirectional self-attention; query, key and value of a head lie side by side in `in_proj`."""

    num_key_value_groups = 1
    is_causal = False

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.in_proj(x).view(*x.shape[:2], self.config.heads, -1).transpose(1, 2)
        output, _ = attention(self, self.config, *fused.chunk(3, -1), attention_mask=None, is_causal=False)
        return self.out_proj(output.flatten(2))


class QwenVLVisionMLP(nn.Module):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        inner = int(config.width * config.mlp_ratio)
        self.c_fc = nn.Linear(config.width, inner)
        self.c_proj = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class QwenVLVisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = QwenVLVisionAttention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = QwenVLVisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class QwenVLVisionEncoder(nn.Module):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(QwenVLVisionLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class QwenVLResampler(nn.Module):
    """One cross-attention of learned queries to the patches; positions are added to queries and keys, not to values."""

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        d = config.output_dim
        self.config = config
        self.query = nn.Parameter(torch.empty(config.n_queries, d))
        self.pos_embed = nn.Parameter(torch.empty(config.n_queries, d), requires_grad=False)
        self.kv_proj = nn.Linear(config.width, d, bias=False) if config.width != d else nn.Identity()
        self.attn = nn.MultiheadAttention(d, d // HEAD, batch_first=True)
        self.ln_q = nn.LayerNorm(d, eps=1e-6)
        self.ln_kv = nn.LayerNorm(d, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [B, P, w] to visual tokens [B, Q, d]."""
        x = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        key = x + resized(self.pos_embed, x.shape[1])
        return self.attn(query, key, x, need_weights=False)[0]


# ------------------------------------------------------------------------------------------------ decoder


class QwenVLAttention(nn.Module):
    """Causal self-attention, its projections fused into `c_attn`."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor, Tensor | None],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:2], self.config.num_attention_heads, -1)
        query, key, value = (x.view(shape).transpose(1, 2) for x in self.c_attn(hidden_states).chunk(3, -1))
        cos, sin, scale = position_embeddings
        query, key = ((x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype) for x in (query, key))
        if scale is not None:
            query = query * scale.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attention(self, self.config, query, key, value, attention_mask=attention_mask, **kwargs)
        return self.c_proj(output.flatten(2)), weights


class QwenVLMLP(nn.Module):
    """`w2` is the gate."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(d, inner, bias=bias)
        self.w2 = nn.Linear(d, inner, bias=bias)
        self.c_proj = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QwenVLDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QwenVLAttention(config, layer_idx)
        self.ln_2 = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QwenVLMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


# ------------------------------------------------------------------------------------------------- models


class QwenVLPreTrainedModel(PreTrainedModel):
    config: Any
    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenVLDecoderLayer", "QwenVLVisionLayer", "QwenVLResampler"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"attn\.masked_bias", r"rotary_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QwenVLDecoderLayer, "attentions": QwenVLAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QwenVLVisionModel):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)
            init.normal_(module.proj, std=len(module.proj) ** -0.5)
        elif isinstance(module, QwenVLResampler):
            init.trunc_normal_(module.query, std=0.02)
            side = math.isqrt(module.config.n_queries)
            init.copy_(module.pos_embed, sincos_2d(side, module.config.output_dim))


class QwenVLVisionModel(QwenVLPreTrainedModel):
    """Pixels [B, 3, size, size] to visual tokens [B, Q, d]."""

    config_class = QwenVLVisionConfig  # type: ignore[assignment]
    base_model_prefix = "visual"
    input_modalities = ["image"]
    _can_record_outputs = {}

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, config.width))
        self.ln_pre = nn.LayerNorm(config.width, eps=1e-6)
        self.transformer = QwenVLVisionEncoder(config)
        self.attn_pool = QwenVLResampler(config)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(config.output_dim, config.output_dim))
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).mT
        x = self.ln_pre(x + resized(self.positional_embedding, x.shape[1]))
        return self.ln_post(self.attn_pool(self.transformer(x))) @ self.proj


class QwenVLModel(QwenVLPreTrainedModel):
    """Tower, embeddings and decoder layers.

    As in the original, a token's position is its place in the padded sequence, and the stretch of rotary positions
    depends on the padded length of the prompt and stays the same while it is continued.
    """

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QwenVLDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.visual = QwenVLVisionModel(config.visual)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.wte = value

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [images, Q, d] of `pixel_values` [images, 3, size, size]."""
        return self.visual(pixel_values)

    def ntk_alpha(self, length: int) -> float:
        """How far rotary positions are stretched for a prompt of `length` tokens; 1 up to the training length."""
        if not self.config.use_dynamic_ntk:
            return 1.0
        return max(2 ** math.ceil(math.log2(length / self.config.seq_length) + 1) - 1, 1)

    def position_embeddings(
        self, start: int, stop: int, alpha: float, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosine and sine [T, head] of positions start..stop-1, and the factors [T, 1] of their queries, if any."""
        config = self.config
        dim = config.kv_channels
        base = config.rotary_emb_base * alpha ** (dim / (dim - 2))
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, device=device).float() / dim))
        positions = torch.arange(start, stop, device=device)
        freqs = torch.outer(positions.float(), inv_freq)
        angles = torch.cat([freqs, freqs], -1)
        scale = None
        if config.use_logn_attn and stop > config.seq_length:
            lengths = torch.arange(start + 1, stop + 1, dtype=torch.float64, device=fp64_device(device))
            scale = (lengths.log() / math.log(config.seq_length)).clamp(min=1).float().to(device)[:, None]
        return angles.cos(), angles.sin(), scale

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final states [B, T, d] of tokens or their embeddings; images are merged in by the model with a head."""
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        stop = start + inputs_embeds.shape[1]
        alpha = self.ntk_alpha(stop) if start == 0 else getattr(past_key_values, "ntk_alpha", 1.0)
        if past_key_values is not None:
            past_key_values.ntk_alpha = alpha  # type: ignore[attr-defined] # continuations keep it
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
            past_key_values=past_key_values,
        )  # fmt: skip
        positions = self.position_embeddings(start, stop, alpha, inputs_embeds.device)
        hidden_states = inputs_embeds
        for layer in self.h:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=positions,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.ln_f(hidden_states), past_key_values if use_cache else None)


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its language head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [images, Q, d] of `pixel_values` [images, 3, size, size]."""
        return self.transformer.get_image_features(pixel_values)

    def _with_images(self, input_ids: Tensor, images: Tensor) -> Tensor:
        """Embeddings [B, T, d] with `images` [images, Q, d] in the places of their placeholders, in order."""
        embeds, places = self.transformer.wte(input_ids), input_ids == self.config.image_token_id
        if places.sum() != images.shape[0] * images.shape[1]:
            raise ValueError(
                f"{len(images)} images need {images.shape[0] * images.shape[1]} tokens <imgpad> (id "
                f"{self.config.image_token_id}) in input_ids, which have {int(places.sum())}"
            )
        return embeds.masked_scatter(places[..., None], images.to(embeds))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> QwenVLOutput:
        """Logits [B, T, vocabulary] of `input_ids` [B, T], whose `<imgpad>` stand for the images `pixel_values`.

        Args:
            input_ids: tokens; of a continuation, those that `past_key_values` lacks.
            pixel_values: [images, 3, size, size], in the order of their placeholders.
            attention_mask: [B, T so far], 0 for padding (on the left).
            past_key_values: of the tokens before.
            inputs_embeds: [B, T, d], instead of `input_ids` and images.
            labels: [B, T], -100 where there is no loss.
            use_cache: whether to return `past_key_values`; default: `config.use_cache`.
            logits_to_keep: how many of the last positions (0: all), or which ones.

        Raises:
            ValueError: if there is not exactly one of `input_ids` and `inputs_embeds`, or there are not as many
                placeholders as images have tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        images = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where the images go")
            images = self.get_image_features(pixel_values)
            inputs_embeds, input_ids = self._with_images(input_ids, images), None
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return QwenVLOutput(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions, image_hidden_states=images
        )

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
        """Chat models (`chat_format` of their generation config) also stop at `<|im_start|>` and `<|im_end|>`.

        These are stop words of the original's chat; their ids follow that of `<|endoftext|>`, its only end of text.
        """
        settings, rest = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        end = settings.eos_token_id
        if getattr(settings, "chat_format", None) == "chatml" and isinstance(end, int):
            settings.eos_token_id = [end, end + 1, end + 2]
        return settings, rest


__all__ = ["QwenVLForConditionalGeneration", "QwenVLModel", "QwenVLPreTrainedModel"]
