"""Distillation: LoRA trained on answers and on what the dense model computes, whose weights the two share in memory.

Defaults are the combination that arXiv 2604.24380 finds best, answers and hidden states in equal parts, trained with
LoRA on the decoder and the projector beside; rank, learning rate, warm-up, schedule and weight decay are those of the
authors' scripts. Ours: states are compared where a kept layer reads them, and relative to their size, so that massive
activations do not rule. `logits` adds the KL divergence of what the two predict.
"""

from __future__ import annotations

from dataclasses import dataclass

from svl.core import SvlError, check_number
from svl.recovery.base import Losses
from svl.recovery.lora import Lora


@dataclass(frozen=True)
class Distill(Lora):
    """As `lora`, with the dense model as a teacher.

    Attributes:
        answers, logits, states, temperature: see `recovery.base.Losses`.
    """

    learning_rate: float = 4e-5
    weight_decay: float = 0.05
    projector: bool = True
    answers: float = 0.5
    logits: float = 0.0
    states: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("answers", "logits", "states"):
            check_number(f"recovery.{name}", getattr(self, name), least=0)
        if not self.answers + self.logits + self.states:
            raise SvlError("recovery.answers, logits and states are all 0, so there is nothing to train for")
        check_number("recovery.temperature", self.temperature, above=0)

    @property
    def losses(self) -> Losses:
        """Answers, logits and states."""
        return Losses(self.answers, self.logits, self.states, self.temperature)
