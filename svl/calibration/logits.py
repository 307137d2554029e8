"""What follows the last decoder layer: final norm, language head, and what some configs do to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svl.core import SvlError
from svl.models.lvlm import Lvlm

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")  # beside the decoder layers


@dataclass(frozen=True)
class LogitTail:
    """The part of a model behind its decoder layers.

    Attributes:
        norm: the final norm.
        head: the language head.
        scale: factor of the logits.
        cap: logits z become cap tanh(z / cap), if there is one.
    """

    norm: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    scale: float = 1.0
    cap: float | None = None

    def logits(self, state: Tensor) -> Tensor:
        """Logits [.., vocabulary] of states [.., d] that leave the last layer."""
        z = self.head(self.norm(state)) * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


def find_logit_tail(lvlm: Lvlm, state: Tensor, logits: Tensor) -> LogitTail:
    """The tail of a model, which makes `logits` of the `state` that leaves its last layer.

    Raises:
        SvlError: if it makes other logits: the model does something more that is not known here.
    """
    config: Any = lvlm.model.config.get_text_config(decoder=True)
    owner = lvlm.model.get_submodule(lvlm.anatomy.layers.rpartition(".")[0])
    norm = next((getattr(owner, name) for name in NORMS if hasattr(owner, name)), nn.Identity())
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    head = lvlm.model.get_output_embeddings()
    if head is not None:
        tail = LogitTail(norm, head, scale, getattr(config, "final_logit_softcapping", None))
        error = (tail.logits(state).to(logits.device).float() - logits.float()).abs().max()
        if float(error) <= 1e-2 * float(logits.float().abs().max()):
            return tail
    raise SvlError(
        f"{config.model_type} does more between its decoder layers and its logits than is known here, so strategies "
        "that try removals out cannot be used; choose one that reads statistics"
    )
