"""mPLUG-Owl2: a LLaMA that has keys, values and norms of its own for visual tokens, 65 of which stand for an image.

Parameters have the names of the original checkpoints, so that these load as they are and exports keep their layout.
B, T, K and H are batch, tokens, keys and heads; d is `hidden_size`, w the tower's width, P its patches and one more, Q
the queries of the abstractor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from svl.models.ports.mplug_owl2.configuration_mplug_owl2 import (
    MPLUGOwl2AbstractorConfig,
    MPLUGOwl2Config,
    MPLUGOwl2VisionConfig,
)


@dataclass
class MPLUGOwl2Output(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and `image_hidden_states` [images, Q + 1, d] if there were images."""

    image_hidden_states: Tensor | None = None


def attention(module: nn.Module, config: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Output [B, T, H, head] (and map, if it is made) of the attention that `config` names; inputs [B, H, T, head]."""
    attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    return attend(module, query, key, value, scaling=query.shape[-1] ** -0.5, dropout=0.0, **options)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * head] as [B, H, T, head]."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sine-cosine positions [n, width] of `positions` [n]."""
    frequencies = 1 / 10000.0 ** (torch.arange(width // 2, dtype=torch.float32) / (width / 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def sincos_2d(side: int, width: int) -> Tensor:
    """Those [1 + side * side, width] of a class token (zeros) and a grid: columns in the first half, rows after."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.cat([sincos(columns.flatten(), width // 2), sincos(rows.flatten(), width // 2)], 1)
    return torch.cat([torch.zeros(1, width, dtype=grid.dtype), grid])


# ------------------------------------------------------------------------------------------------- vision


class MPLUGOwl2VisionEmbeddings(nn.Module):
    """Patches and a class token, with learned positions."""

    def __init__(self, config: MPLUGOwl2VisionConfig):
        super().__init__()
        w, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, w))
        self.patch_embed = nn.Conv2d(3, w, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1, patches + 1, w))
        self.pre_layernorm = nn.LayerNorm(w, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return self.pre_layernorm(x + self.position_embedding)


class MPLUGOwl2VisionAttention(nn.Module):
    """Bidirectional self-attention; query, key and value of a head lie side by side in `query_key_value`."""

    num_key_value_groups = 1
    is_causal = False

    def __init__(self, config: MPLUGOwl2VisionConfig):
        super().__init__()
        self.config = config
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        fused = split(self.query_key_value(x), self.config.num_attention_heads).chunk(3, -1)
        output, _ = attention(self, self.config, *fused, attention_mask=None, is_causal=False)
        return self.dense(output.flatten(2))


class MPLUGOwl2VisionMLP(nn.Module):
    def __init__(self, config: MPLUGOwl2VisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class MPLUGOwl2VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: MPLUGOwl2VisionConfig):
        super().__init__()
        self.self_attn = MPLUGOwl2VisionAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MPLUGOwl2VisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class MPLUGOwl2Encoder(nn.Module):
    """Layers, which are called with what it is called with besides the state."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *args)
        return x


class MPLUGOwl2VisionModel(nn.Module):
    """Pixels [B, 3, size, size] to states [B, P, w]."""

    def __init__(self, config: MPLUGOwl2VisionConfig):
        super().__init__()
        self.embeddings = MPLUGOwl2VisionEmbeddings(config)
        self.encoder = MPLUGOwl2Encoder([MPLUGOwl2VisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


# --------------------------------------------------------------------------------------------- abstractor


class MPLUGOwl2AbstractorAttention(nn.Module):
    """Attention of queries to themselves and the patches; positions are added to queries and keys, not to values."""

    num_key_value_groups = 1
    is_causal = False
    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: MPLUGOwl2AbstractorConfig):
        super().__init__()
        self.config = config
        w = config.hidden_size
        self.query, self.key, self.value = (nn.Linear(w, w) for _ in range(3))
        for name, table in self.tables().items():
            self.register_buffer(name, table.to(self.query.weight.dtype))

    def tables(self) -> dict[str, Tensor]:
        """Positions of queries [Q, w] and patches [P, w]. They are fixed, but original checkpoints hold them."""
        config = self.config
        return {
            "q_pos_embed": sincos(torch.arange(config.num_learnable_queries), config.hidden_size),
            "k_pos_embed": sincos_2d(config.grid_size or 0, config.hidden_size),
        }

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Queries [B, Q, w] and what they look at [B, Q + P, w] to [B, Q, w]."""
        positions = torch.cat([self.q_pos_embed, self.k_pos_embed])
        query, key, value = self.query(x + self.q_pos_embed), self.key(seen + positions), self.value(seen)
        parts = (split(part, self.config.num_attention_heads) for part in (query, key, value))
        output, _ = attention(self, self.config, *parts, attention_mask=None, is_causal=False)
        return output.flatten(2)


class MPLUGOwl2AbstractorMLP(nn.Module):
    """`w1` is the gate."""

    def __init__(self, config: MPLUGOwl2AbstractorConfig):
        super().__init__()
        w, inner = config.hidden_size, config.intermediate_size
        self.act = nn.SiLU()
        self.w1 = nn.Linear(w, inner)
        self.w2 = nn.Linear(inner, w)
        self.w3 = nn.Linear(w, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(self.act(self.w1(x)) * self.w3(x)))


class MPLUGOwl2AbstractorOutput(nn.Module):
    def __init__(self, config: MPLUGOwl2AbstractorConfig):
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MPLUGOwl2AbstractorMLP(config)

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        x = x + self.out_proj(attended)
        return x + self.mlp(self.norm2(x))


class MPLUGOwl2AbstractorCrossAttention(nn.Module):
    """A layer of the abstractor. Unlike elsewhere, the normed queries are what is added to."""

    def __init__(self, config: MPLUGOwl2AbstractorConfig):
        super().__init__()
        self.attention = MPLUGOwl2AbstractorAttention(config)
        self.output = MPLUGOwl2AbstractorOutput(config)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.normk = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        x = self.norm1(x)
        return self.output(self.attention(x, torch.cat([x, self.normk(patches)], 1)), x)


class MPLUGOwl2AbstractorLayer(GradientCheckpointingLayer):
    def __init__(self, config: MPLUGOwl2AbstractorConfig):
        super().__init__()
        self.crossattention = MPLUGOwl2AbstractorCrossAttention(config)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        return self.crossattention(x, patches)


class MPLUGOwl2Abstractor(nn.Module):
    """States of the tower [B, P, w] to visual tokens [B, Q + 1, d], of which the last one ends an image."""

    def __init__(self, config: MPLUGOwl2AbstractorConfig, d: int):
        super().__init__()
        self.encoder = MPLUGOwl2Encoder([MPLUGOwl2AbstractorLayer(config) for _ in range(config.num_hidden_layers)])
        self.visual_fc = nn.Linear(config.hidden_size, d)
        self.query_embeds = nn.Parameter(torch.empty(1, config.num_learnable_queries, config.hidden_size))
        self.vit_eos = nn.Parameter(torch.empty(1, 1, d))

    def forward(self, patches: Tensor) -> Tensor:
        b = len(patches)
        x = self.visual_fc(self.encoder(self.query_embeds.expand(b, -1, -1), patches))
        return torch.cat([x, self.vit_eos.expand(b, -1, -1)], 1)


# ------------------------------------------------------------------------------------------------ decoder


class MPLUGOwl2Multiway(nn.Module):
    """Two modules alike: the first for text, the second for visual tokens."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.multiway = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor, visual: Tensor | None) -> Tensor:
        """What the module of its modality makes of each token of `x` [B, T, d].

        `visual` [B or 1, T] is true where a token is visual; None: all is text.
        """
        text, image = self.multiway
        if visual is None:
            return text(x)
        visual = visual.expand(x.shape[:2])
        made = text(x[~visual])
        result = made.new_empty(*x.shape[:2], made.shape[-1])
        result[~visual], result[visual] = made, image(x[visual])
        return result


class MPLUGOwl2Attention(nn.Module):
    """Causal self-attention; keys and values of visual tokens have projections of their own."""

    is_causal = True

    def __init__(self, config: MPLUGOwl2Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = heads // groups
        d, head, bias = config.hidden_size, config.head_dim or config.hidden_size // heads, config.attention_bias
        self.q_proj = nn.Linear(d, heads * head, bias=bias)
        self.k_proj = MPLUGOwl2Multiway(lambda: nn.Linear(d, groups * head, bias=bias))
        self.v_proj = MPLUGOwl2Multiway(lambda: nn.Linear(d, groups * head, bias=bias))
        self.o_proj = nn.Linear(heads * head, d, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        visual: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = self.config.num_attention_heads
        query = split(self.q_proj(hidden_states), heads)
        key, value = (
            split(projection(hidden_states, visual), heads // self.num_key_value_groups)
            for projection in (self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attention(self, self.config, query, key, value, attention_mask=attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class MPLUGOwl2DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MPLUGOwl2Config, layer_idx: int):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = MPLUGOwl2Attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = MPLUGOwl2Multiway(lambda: LlamaRMSNorm(d, eps=eps))
        self.post_attention_layernorm = MPLUGOwl2Multiway(lambda: LlamaRMSNorm(d, eps=eps))

    def forward(self, hidden_states: Tensor, visual: Tensor | None = None, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states, visual)
        hidden_states = hidden_states + self.self_attn(normed, visual=visual, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, visual))


# ------------------------------------------------------------------------------------------------- models


class MPLUGOwl2PreTrainedModel(PreTrainedModel):
    config: Any
    config_class = MPLUGOwl2Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MPLUGOwl2DecoderLayer", "MPLUGOwl2VisionLayer", "MPLUGOwl2AbstractorLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MPLUGOwl2DecoderLayer, "attentions": MPLUGOwl2Attention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MPLUGOwl2VisionEmbeddings):
            init.normal_(module.cls_token, std=0.02)
            init.normal_(module.position_embedding, std=0.02)
        elif isinstance(module, MPLUGOwl2AbstractorAttention):
            for name, table in module.tables().items():
                init.copy_(getattr(module, name), table)
        elif isinstance(module, MPLUGOwl2Abstractor):
            init.normal_(module.query_embeds, std=0.02)
            init.normal_(module.vit_eos, std=0.02)


class MPLUGOwl2Model(MPLUGOwl2PreTrainedModel):
    """Tower, abstractor, embeddings and decoder layers."""

    def __init__(self, config: MPLUGOwl2Config):
        super().__init__(config)
        visual = config.visual_config
        if visual._attn_implementation is None:  # its parts are no models of their own, which would see to it
            visual._attn_implementation = config._attn_implementation
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MPLUGOwl2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.vision_model = MPLUGOwl2VisionModel(visual.visual_model)
        self.visual_abstractor = MPLUGOwl2Abstractor(visual.visual_abstractor, config.hidden_size)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [images, Q + 1, d] of `pixel_values` [images, 3, size, size]."""
        return self.visual_abstractor(self.vision_model(pixel_values))

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        visual: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final states [B, T, d] of tokens or their embeddings, of which `visual` [B, T] tells the images'."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        positions = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                visual=visual,
                attention_mask=mask,
                position_embeddings=positions,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values if use_cache else None)


class MPLUGOwl2ForConditionalGeneration(MPLUGOwl2PreTrainedModel, GenerationMixin):
    """mPLUG-Owl2 with its language head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MPLUGOwl2Config):
        super().__init__(config)
        self.model = MPLUGOwl2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [images, Q + 1, d] of `pixel_values` [images, 3, size, size]."""
        return self.model.get_image_features(pixel_values)

    def _with_images(self, input_ids: Tensor, places: Tensor, images: Tensor | None) -> Tensor:
        """Embeddings [B, T, d] with `images` [images, Q + 1, d] in their `places` [B, T], in order."""
        wanted = 0 if images is None else images.shape[0] * images.shape[1]
        if places.sum() != wanted:
            raise ValueError(
                f"{0 if images is None else len(images)} images need {wanted} tokens <|image|> (id "
                f"{self.config.image_token_index}) in input_ids, which have {int(places.sum())}"
            )
        embeds = self.model.embed_tokens(input_ids.masked_fill(places, 0))  # the vocabulary does not have it
        return embeds if images is None else embeds.masked_scatter(places[..., None], images.to(embeds))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        visual: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MPLUGOwl2Output:
        """Logits [B, T, vocabulary] of `input_ids` [B, T], whose `<|image|>` stand for the images `pixel_values`.

        Padding may be on either side. (The original's own batches with images mask wrong tokens unless it is on the
        right, and so do its later steps unless there is none; its authors evaluate one by one.)

        Args:
            input_ids: tokens; of a continuation, those that `past_key_values` lacks.
            pixel_values: [images, 3, size, size], in the order of their placeholders.
            attention_mask: [B, T so far], 0 for padding.
            position_ids: [B, T]; default: places in the padded sequence.
            past_key_values: of the tokens before.
            inputs_embeds: [B, T, d], instead of `input_ids` and images.
            visual: [B, T], true where `inputs_embeds` are those of images; default: nowhere.
            labels: [B, T], -100 where there is no loss.
            use_cache: whether to return `past_key_values`; default: `config.use_cache`.
            logits_to_keep: how many of the last positions (0: all), or which ones.

        Raises:
            ValueError: if there is not exactly one of `input_ids` and `inputs_embeds`, what belongs to one comes with
                the other, or there are not as many placeholders as images have tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        images = None
        if input_ids is None:
            if pixel_values is not None:
                raise ValueError("pixel_values need input_ids, which say where the images go")
        else:
            if visual is not None:
                raise ValueError("visual belongs to inputs_embeds; of input_ids it is known")
            images = None if pixel_values is None else self.get_image_features(pixel_values)
            places = input_ids == self.config.image_token_index
            inputs_embeds = self._with_images(input_ids, places, images)
            visual = None if images is None else places
        outputs = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual=visual,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MPLUGOwl2Output(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions, image_hidden_states=images
        )


__all__ = ["MPLUGOwl2ForConditionalGeneration", "MPLUGOwl2Model", "MPLUGOwl2PreTrainedModel"]
