"""Attention that also measures itself: per-token sums by modality, without ever holding a T x T x heads map.

Registered with transformers as attention implementation "svl". On CUDA, fused kernels take the sums beside "sdpa", but
for capped scores. Elsewhere queries are taken in chunks: each chunk's softmax gives the output *and*, while it is at
hand, how much attention every key received and every query paid, per modality and averaged over heads. Keys to the
right of a causal chunk are skipped. The maps are those of eager attention (softmax in fp32), so the statistics equal
`output_attentions=True` with `attn_implementation="eager"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from svl.calibration.hooks import fused_kernels
from svl.core import SvlError
from svl.models.transformers_internals import swap_decoder_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "svl"
CHUNK = 64  # queries at a time on the CPU: fast, and temporary memory of B x H x 64 x T
LARGE_CHUNK = 256  # on accelerators, which small products leave idle
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
    _visible: list[tuple[Tensor | None, bool, tuple[Tensor, Tensor]]] = field(default_factory=list)
    _causal: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def modality_on(self, device: torch.device) -> Tensor:
        """`modality` on a layer's device; what is measured of a layer stays there."""
        if device not in self._copies:
            self._copies[device] = self.modality.to(device)
        return self._copies[device]

    def keep(self, layer: int, received: Tensor, emitted: Tensor, visible: tuple[Tensor, Tensor]) -> None:
        """Keep a layer's sums [B, 2, T], and what `visible` gives."""
        # rows of padding attend to something, too: not measured
        self.received[layer], self.emitted[layer] = received, emitted * self._valid_on(received.device)
        self.queries[layer], self.keys[layer] = visible

    def _valid_on(self, device: torch.device) -> Tensor:
        """[B, 1, T], 1 where a token is no padding."""
        return self.modality_on(device).sum(1, keepdim=True)

    def check_layers(self, n_layers: int) -> None:
        """Raise SvlError if some layer had no attention map (it is a convolution, or linear attention)."""
        if mapless := [i for i in range(n_layers) if i not in self.received]:
            raise SvlError(f"layers {mapless} have no attention map to measure; {WAY_OUT}")

    def visible(self, mask: Tensor | None, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many queries of each modality see key j, and keys of each modality query i sees, under `mask`."""
        known = [(m, counts) for m, c, counts in self._visible if c == causal and counts[0].device == device]
        for m, counts in known:
            if m is mask:  # layers of one kind share their mask, so this is done once per kind
                return counts
        for m, counts in known:  # and once per device: there, each layer gets a copy of its own
            if m is not None and mask is not None and torch.equal(m, mask):
                return counts
        modality = self.modality_on(device)
        whole = torch.ones(modality.shape[-1], modality.shape[-1], device=device)
        seen = mask[:, 0].float() if mask is not None else whole.tril() if causal else whole
        valid = self._valid_on(device)
        counts = (modality @ seen * valid, (seen @ modality.mT).mT * valid)
        self._visible.append((mask, causal, counts))
        return counts

    def is_causal(self, mask: Tensor) -> bool:
        """Whether no query looks at a later key under `mask`; its device is waited for once, not layer by layer."""
        known = self._causal.get(id(mask))
        if known is None:
            known = self._causal[id(mask)] = (mask, _none_later(mask))
        return known[1]


_meter: ContextVar[Meter | None] = ContextVar("attention meter", default=None)


@contextmanager
def metering(model: PreTrainedModel, modality: Tensor) -> Iterator[Meter]:
    """Within the block, forward passes of `model` fill the meter that it gives; afterwards all is as before.

    Raises:
        SvlError: if its layers attend to other things than the sequence.
    """
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "cross_attention_layers", None):
        raise SvlError(f"cross-attention layers of {text.model_type} have no map over the tokens to measure; {WAY_OUT}")
    before, meter = swap_decoder_attention(model, NAME), Meter(modality)
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)
        swap_decoder_attention(model, before)


def measured_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, T, H, D]; fills the current meter.

    `query` [B, H, T, D], `key` and `value` [B, H_kv, K, D] (H a multiple of H_kv), `attention_mask` bool
    [B, 1, T, K], True where a query may look, or None: causal, unless the option `is_causal` or the module says
    otherwise. Of the other options that transformers passes, `softcap` counts.

    Raises:
        SvlError: for attention with sinks (`s_aux`), which has no plain softmax map.
    """
    if options.get("s_aux") is not None:
        raise SvlError(f"attention sinks leave no plain softmax map to measure; {WAY_OUT}")
    t, k = query.shape[2], key.shape[2]
    causal = _is_causal(module, attention_mask, t, options.get("is_causal"))
    meter, layer = _current_meter(module, t, k)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = options.get("softcap")
    modality = None if meter is None else meter.modality_on(query.device)
    kernels = None
    if modality is not None and softcap is None:
        kernels = fused_kernels(query.device, query.dtype, query.shape[-1])
    if kernels is not None:
        sdpa = AttentionInterface()["sdpa"]
        asked = {"scaling": scaling, "is_causal": options.get("is_causal")}
        output, _ = sdpa(module, query, key, value, attention_mask, **asked)
        received, emitted = kernels.attention_sums(query, key, attention_mask, causal, scaling, modality)
    else:
        scaled = query * scaling
        output, received, emitted = _in_chunks(scaled, key, value, attention_mask, causal, softcap, modality)
    if meter is not None:
        meter.keep(layer, received, emitted, meter.visible(attention_mask, causal, query.device))
    return output, None


def _in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    modality: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, D] for queries that are scaled already; received and emitted, 0 without a `modality`."""
    b, h, t, d = query.shape
    h_kv, k = key.shape[1], key.shape[2]
    received, emitted = query.new_zeros(b, 2, k, dtype=torch.float32), query.new_zeros(b, 2, t, dtype=torch.float32)
    grouped = query.reshape(b, h_kv, h // h_kv, t, d)
    outputs = []
    chunk = CHUNK if query.device.type == "cpu" else LARGE_CHUNK
    for start in range(0, t, chunk):
        stop = min(start + chunk, t)
        seen = stop if causal and t == k else k
        score = _scores(grouped[..., start:stop, :], key[:, :, :seen], softcap)
        hidden = None
        if mask is not None:
            hidden = ~mask[:, :, None, start:stop, :seen]
        elif causal:
            hidden = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device).triu(1 + start)
        if hidden is not None:
            score = score.masked_fill_(hidden, torch.finfo(score.dtype).min)
        p = F.softmax(score, dim=-1, dtype=torch.float32)
        if modality is not None:
            mean = p.sum((1, 2)) / h
            received[..., :seen] += modality[..., start:stop] @ mean
            emitted[..., start:stop] = modality[..., :seen] @ mean.mT
        p = p.to(value.dtype).view(b, h_kv, -1, seen)
        outputs.append((p @ value[:, :, :seen]).view(b, h, stop - start, -1))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), received, emitted


def _is_causal(module: Any, mask: Tensor | None, t: int, asked: bool | None) -> bool:
    """Whether no query looks at a later key."""
    if mask is not None:
        meter = _meter.get()
        return _none_later(mask) if meter is None else meter.is_causal(mask)
    return t > 1 and bool(getattr(module, "is_causal", True) if asked is None else asked)


def _none_later(mask: Tensor) -> bool:
    return not bool(mask.triu(1).any())


def _current_meter(module: Any, t: int, k: int) -> tuple[Meter | None, int]:
    """The meter to fill and the layer's number; None in a decoding step, or where others than the sequence are seen."""
    meter, layer = _meter.get(), getattr(module, "layer_idx", None)
    if meter is None or layer is None or not t == k == meter.modality.shape[-1]:
        return None, -1
    return meter, layer


def _scores(query: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """Scores [B, H_kv, H / H_kv, t, K] of scaled queries [B, H_kv, H / H_kv, t, D] and keys [B, H_kv, K, D]."""
    b, h_kv, groups, t, d = query.shape
    score = (query.reshape(b, h_kv, groups * t, d) @ key.mT).view(b, h_kv, groups, t, -1)
    return score if softcap is None else torch.tanh(score / softcap) * softcap


AttentionInterface.register(NAME, measured_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
