"""Attention that also measures itself: per-token sums by modality, without ever holding a T x T x heads map.

Registered with transformers as attention implementation "svl". Queries are taken in chunks: each chunk's softmax gives
the output *and*, while it is at hand, how much attention every key received and every query paid, per modality and
averaged over heads. Keys to the right of a causal chunk are skipped. The maps are those of eager attention (softmax in
fp32), so the statistics equal `output_attentions=True` with `attn_implementation="eager"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from svl.core import SvlError

NAME = "svl"
CHUNK = 64  # queries at a time: fast, and temporary memory of B x H x 64 x T
WAY_OUT = "choose a selector that needs none and set calibration.statistics=[cosine]"


@dataclass
class Meter:
    """Attention sums of one forward pass. Modality 0 is visual, 1 textual; padding belongs to neither.

    Attributes:
        modality: [B, 2, T], 1 where the token is of that modality.
        received, emitted: by layer index, [B, 2, T]; see `svl.core.TokenTrace`.
        queries, keys: by layer index, [B, 2, T], numbers of visible queries and keys.
    """

    modality: Tensor
    received: dict[int, Tensor] = field(default_factory=dict)
    emitted: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    _visible: dict[tuple[int, bool], tuple[Tensor | None, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def check(self, n_layers: int) -> None:
        """Raise SvlError if some layer had no attention map (it is a convolution, or linear attention)."""
        if mapless := [i for i in range(n_layers) if i not in self.received]:
            raise SvlError(f"layers {mapless} have no attention map to measure; {WAY_OUT}")

    def visible(self, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        """How many queries of each modality see key j, and keys of each modality query i sees, under `mask`."""
        key = (id(mask), causal)
        known = self._visible.get(key)
        if known is None:  # layers of one kind share their mask, so this is done once per kind
            t = self.modality.shape[-1]
            whole = torch.ones(t, t, device=self.modality.device)
            seen = mask[:, 0].float() if mask is not None else whole.tril() if causal else whole
            counts = (self.modality @ seen, (seen @ self.modality.mT).mT)
            known = self._visible[key] = (mask, counts)  # holding the mask keeps its id from being reused
        return known[1]


_meter: ContextVar[Meter | None] = ContextVar("attention meter", default=None)


@contextmanager
def metering(model: Any, modality: Tensor) -> Iterator[Meter]:
    """Within the block, forward passes of `model` fill the meter that it gives; afterwards all is as before.

    Raises:
        SvlError: if its layers attend to other things than the sequence.
    """
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "cross_attention_layers", None):
        raise SvlError(f"cross-attention layers of {text.model_type} have no map over the tokens to measure; {WAY_OUT}")
    before, meter = text._attn_implementation, Meter(modality)
    # "" is the root alone: where text and other parts share one config, the others keep their attention
    part = next((n for n in model.config.sub_configs if getattr(model.config, n, None) is text), "")
    model.set_attn_implementation({part: NAME})
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)
        model.set_attn_implementation({part: before})


def measured_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, T, H, D]; fills the current meter.

    `query` [B, H, T, D], `key` and `value` [B, H_kv, K, D] (H a multiple of H_kv), `attention_mask` bool
    [B, 1, T, K], True where a query may look, or None: causal, unless `is_causal` or the module says otherwise.

    Raises:
        SvlError: for attention with sinks, which has no plain softmax map.
    """
    if s_aux is not None:
        raise SvlError(f"attention sinks leave no plain softmax map to measure; {WAY_OUT}")
    meter = _meter.get()
    b, h, t, d = query.shape
    h_kv, k = key.shape[1], key.shape[2]
    groups = h // h_kv
    scaling = d**-0.5 if scaling is None else scaling
    layer: Any = getattr(module, "layer_idx", None)
    if layer is None or (meter is not None and not t == k == meter.modality.shape[-1]):
        meter = None  # a decoding step, or attention to something else than the sequence itself
    if meter is not None:
        received = torch.zeros(b, 2, k, device=query.device)
        emitted = torch.zeros(b, 2, t, device=query.device)
    if attention_mask is None:
        causal = t > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    else:
        causal = not bool(attention_mask.triu(1).any())
    grouped = query.reshape(b, h_kv, groups, t, d) * scaling
    outputs = []
    for start in range(0, t, CHUNK):
        stop = min(start + CHUNK, t)
        seen = stop if causal and t == k else k
        q = grouped[..., start:stop, :].reshape(b, h_kv, groups * (stop - start), d)
        score = (q @ key[:, :, :seen].mT).view(b, h_kv, groups, stop - start, seen)
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if attention_mask is not None:
            score = score.masked_fill_(~attention_mask[:, :, None, start:stop, :seen], torch.finfo(score.dtype).min)
        elif causal:
            hidden = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).triu(1 + start)
            score = score.masked_fill_(hidden, torch.finfo(score.dtype).min)
        p = F.softmax(score, dim=-1, dtype=torch.float32)
        if meter is not None:
            mean = p.sum((1, 2)) / h
            received[..., :seen] += meter.modality[..., start:stop] @ mean
            emitted[..., start:stop] = meter.modality[..., :seen] @ mean.mT
        p = p.to(value.dtype).view(b, h_kv, -1, seen)
        outputs.append((p @ value[:, :, :seen]).view(b, h, stop - start, -1))
    if meter is not None:
        valid = meter.modality.sum(1, keepdim=True)  # rows of padding attend to something, too: not measured
        queries, keys = meter.visible(attention_mask, causal)
        meter.received[layer], meter.emitted[layer] = received, emitted * valid
        meter.queries[layer], meter.keys[layer] = queries * valid, keys * valid
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, measured_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
