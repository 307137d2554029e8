"""FastV: after a few layers, visual tokens that got little attention are dropped (Chen et al., arXiv 2403.06764).

The first `layer` decoder layers see every token. From the attention that the last token of the prompt pays in the last
of them, averaged over heads, the share `keep` of each sample's visual tokens is chosen that got most; later layers
compute and cache the others no more. Positions stay what they were. With layers removed, `layer` counts those left.

Only the pass over the prompt chooses; later steps attend to what was kept. Rows of a batch may keep different numbers
of tokens: they are padded on the left again, as the prompts are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from svl.core import Plan, SvlError, check_count, check_number
from svl.models.layer_calls import first_argument, first_output, with_first_argument, with_first_output
from svl.models.lvlm import Lvlm
from svl.models.transformers_internals import swap_decoder_attention
from svl.pruning import surgery
from svl.visual_tokens.base import VisualTokens

NAME = "svl_fastv"


@dataclass(frozen=True)
class Fastv(VisualTokens):
    """See the module.

    Attributes:
        layer: number of layers that see all tokens, at least 1 (the paper's K).
        keep: share of the visual tokens that later layers see (the paper's 1 - R).
    """

    layer: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_count("visual_tokens.layer", self.layer, least=1)
        check_number("visual_tokens.keep", self.keep, least=0, most=1)

    def check_plan(self, plan: Plan) -> None:
        """Raise SvlError if a plan leaves no more than `layer` layers, or removes the attention that chooses tokens."""
        if self.layer >= len(plan.kept):
            raise SvlError(
                f"visual_tokens.layer is {self.layer}, but the plan leaves {len(plan.kept)} layers, and one behind it "
                "must see fewer tokens"
            )
        chooser = plan.kept[self.layer - 1]
        if (chooser, "attn") in plan.sublayers:
            raise SvlError(
                f"visual_tokens.layer is {self.layer}: tokens are chosen by the attention of layer {chooser}, which "
                "the plan removes; choose another number of layers, or another plan"
            )

    def apply(self, lvlm: Lvlm) -> Lvlm:
        """A copy of the model (sharing its tensors) that drops visual tokens; `lvlm` stays as it is.

        Raises:
            SvlError: if the model sees no images, or has no more than `layer` layers; when it runs, if its layers have
                no attention map or are called with something that is not known here.
        """
        if not lvlm.takes_images:
            raise SvlError(f"visual_tokens: model '{lvlm.name}' reads text only, so it has no visual tokens to drop")
        if self.layer >= lvlm.anatomy.n_layers:
            raise SvlError(f"visual_tokens.layer is {self.layer}, but '{lvlm.name}' has {lvlm.anatomy.n_layers} layers")
        copied = surgery.apply(lvlm, Plan(lvlm.anatomy.n_layers, ()))
        swap_decoder_attention(copied.model, NAME)
        _Dropper(self, copied).install()
        return copied


@dataclass
class _Dropper:
    """The hooks of one model, and what they know of the prompt that it is answering.

    `present` and `visual` [B, T] say what the prompt's places hold, `attention` [B, T] what the last token paid them.
    `kept` [B, T'] are the places that later layers see, in order; where a row has fewer, its first ones are not `real`.
    `whole` [B, T, d] is the state of all tokens where the others were dropped.
    """

    method: Fastv
    lvlm: Lvlm
    prompt: bool = True  # whether this pass is over the prompt
    attention: Tensor | None = None
    masks: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def install(self) -> None:
        """Watch the model from its inputs to its last layer."""
        layers, full = self.lvlm.layers, self.method.layer
        self.lvlm.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for module in layers[full - 1].modules():
            if hasattr(module, "layer_idx"):
                module.svl_watcher = self  # type: ignore[assignment]
        layers[full].register_forward_pre_hook(self._drop, with_kwargs=True)
        for layer in layers[full:]:
            layer.register_forward_pre_hook(self._fit, with_kwargs=True)
        layers[-1].register_forward_hook(self._restore)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass starts, over a prompt or over a token after it."""
        cache = kwargs.get("past_key_values")
        self.prompt = cache is None or cache.get_seq_length() == 0
        self.masks.clear()
        if not self.prompt:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise SvlError("visual_tokens: FastV needs input_ids, which say where the visual tokens are")
        mask = kwargs.get("attention_mask")
        self.visual = self.lvlm.is_visual(ids)
        self.present = torch.ones_like(self.visual) if mask is None else mask.bool()
        self.attention = None

    def _drop(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first layer that sees fewer tokens is called on a prompt: choose them."""
        if not self.prompt:
            return None
        if self.attention is None:
            raise SvlError(f"visual_tokens: layer {self.method.layer - 1} of '{self.lvlm.name}' has no attention map")
        numbers = (self.visual.sum(1, keepdim=True) * self.method.keep + 0.5).long()
        attention = self.attention.to(self.visual.device).masked_fill(~self.visual, -1)
        rank = attention.argsort(dim=1, descending=True, stable=True).argsort(1)
        stays = self.present & (~self.visual | (rank < numbers))
        self.kept = stays.byte().sort(dim=1, stable=True).indices[:, -int(stays.sum(1).max()) :]
        self.real = stays.gather(1, self.kept)
        self.whole = first_argument(args, kwargs)
        return with_first_argument(args, kwargs, _gather(self.whole, self.kept, 1))

    def _fit(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A later layer is called: with what fits the tokens that it sees, or its shorter past."""
        mask = kwargs.get("attention_mask")
        if id(mask) not in self.masks:
            self.masks[id(mask)] = mask, self._mask(mask, kwargs.get("past_key_values"))
        if self.prompt:
            kwargs = {name: self._shorter(value) for name, value in kwargs.items()}
        return args, {**kwargs, "attention_mask": self.masks[id(mask)][1]}

    def _shorter(self, value: Any) -> Any:
        """An argument of a layer without the dropped tokens: positions, and what is computed from them."""
        n = self.present.shape[1]
        if isinstance(value, tuple):
            return tuple(map(self._shorter, value))
        if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[-2] == n:
            return _gather(value, self.kept, value.ndim - 2)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-1] == n:
            return _gather(value, self.kept, value.ndim - 1)
        return value[: self.kept.shape[1]] if isinstance(value, Tensor) and value.shape == (n,) else value

    def _mask(self, mask: Any, cache: Any) -> Tensor | None:
        """Which of the tokens that are left a query may look at: [B, 1, queries, keys], or None for all before it."""
        n = self.present.shape[1]
        later = 0 if self.prompt else cache.get_seq_length() - n  # tokens since the prompt, this one included
        real = F.pad(self.real, (0, later), value=True)[:, None, None]
        if mask is None and bool(self.real.all()):
            return None
        if mask is None:
            size = self.kept.shape[1]
            causal = torch.ones(size, size, dtype=torch.bool, device=real.device).tril()
            return real & causal if self.prompt else real
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[-1] != n + later:
            raise SvlError(f"visual_tokens: layers of '{self.lvlm.name}' use masks that FastV cannot shorten")
        places = torch.cat([self.kept, torch.arange(n, n + later, device=real.device).expand(len(self.kept), -1)], 1)
        mask = mask.expand(len(places), -1, -1, -1)
        if self.prompt:
            mask = _gather(mask, self.kept, 2)
        return _gather(mask, places, 3) & real.to(mask.device)

    def _restore(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The last layer's output at the prompt's places; dropped tokens have the state in which they were dropped."""
        if not self.prompt:
            return None
        state = first_output(output)
        places = self.kept[..., None].expand(-1, -1, state.shape[-1]).to(state.device)
        whole = self.whole.to(state.device).scatter(1, places, state)
        return with_first_output(output, whole)


def _gather(x: Tensor, places: Tensor, dim: int) -> Tensor:
    """Of dimension `dim` of x, what `places` [B, n] name in every row; the batch is the first dimension of size B.

    Without one (or where it is 1, for all rows alike), one is made.
    """
    (b, n), places = places.shape, places.to(x.device)  # a layer's arguments may come from several devices
    batch = next((i for i in range(dim) if x.shape[i] == b), None)
    if batch is None:
        batch = next((i for i in range(dim) if x.shape[i] == 1), None)
        if batch is None:
            x, batch, dim = x[None], 0, dim + 1
        x = x.expand(*x.shape[:batch], b, *x.shape[batch + 1 :])
    shape = [1] * x.ndim
    shape[batch], shape[dim] = b, n
    return x.gather(dim, places.view(shape).expand(*x.shape[:dim], n, *x.shape[dim + 1 :]))


def watched_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attention as "sdpa" computes it; tells a watcher what the last token of a prompt pays, averaged over heads."""
    watcher = getattr(module, "svl_watcher", None)
    if watcher is not None and watcher.prompt:
        d = query.shape[-1]
        last = query[:, :, -1].view(len(query), key.shape[1], -1, d)
        scale = kwargs.get("scaling") or d**-0.5
        score = (last @ key.mT).float().flatten(1, 2) * scale  # [B, H, T]
        if softcap := kwargs.get("softcap"):
            score = torch.tanh(score / softcap) * softcap
        if attention_mask is not None:
            score = score.masked_fill(~attention_mask[:, :, -1], float("-inf"))
        watcher.attention = score.softmax(-1).mean(1)
    attend: Callable[..., Any] = AttentionInterface()["sdpa"]
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, watched_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
