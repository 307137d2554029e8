"""What a method of recovery is: which parameters of the pruned model are trained, on which losses, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from svl.core import Method, SvlError, check_count, check_number, one_of
from svl.core.settings import LARGEST_SEED

if TYPE_CHECKING:
    from svl.core import Plan
    from svl.data.samples import Samples
    from svl.models.lvlm import Lvlm

MOST_STEPS = 10**7  # of an optimiser; also where only seconds are limited
MOST_AT_ONCE = 10**5  # samples in a pass, passes in a step: with so many steps, samples can still be counted


@dataclass(frozen=True)
class Parts:
    """What of a pruned model is trained, by names in that model; all else is frozen.

    Attributes:
        tensors: parameters that are trained as a whole.
        adapted: linear modules that get an adapter of low rank (LoRA), which is merged afterwards.
    """

    tensors: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Losses:
    """What is minimised: a weighted sum; parts of weight 0 are not computed.

    Attributes:
        answers: cross-entropy (nats) of answer tokens given what precedes them, mean over the batch's answer tokens.
        logits: KL divergence from the dense model to the trained one at the same positions, at `temperature`, times
            its square.
        states: of the state that enters each kept layer behind the first removal, and of the one that leaves the last:
            |h' - h|^2 / |h|^2, h being the dense model's; mean over layers and tokens.
        temperature: divides logits in the KL divergence.

    Raises:
        SvlError: if a weight is negative or not finite, or all are 0, or the temperature is not above 0.
    """

    answers: float = 1.0
    logits: float = 0.0
    states: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("answers", "logits", "states"):
            check_number(f"the weight of the loss '{name}'", getattr(self, name), least=0)
        if not self.answers + self.logits + self.states:
            raise SvlError("all losses (answers, logits, states) have the weight 0, so there is nothing to train for")
        check_number("the temperature of the loss 'logits'", self.temperature, above=0)

    @property
    def need_teacher(self) -> bool:
        """Whether the dense model runs beside the trained one."""
        return bool(self.logits or self.states)


@dataclass(frozen=True)
class Adapter:
    """Settings of LoRA: W + (alpha / rank) B A.

    Raises:
        SvlError: on a number out of range.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("the rank of adapters", self.rank, least=1)
        check_count("alpha of adapters", self.alpha, least=1)
        check_number("the dropout of adapters", self.dropout, least=0, below=1)


@dataclass(frozen=True)
class Recovery(Method, ABC):
    """What is trained, and how. The optimiser is AdamW.

    Attributes:
        steps: of the optimiser; None: those of `budget_s`, or without it one pass over the data.
        budget_s: seconds of training after which it stops; None: no limit. With one, the same run again may end with
            other weights.
        learning_rate: its largest value.
        warmup: share of the budget (of steps or seconds, whichever is further) in which it rises, from a tenth on.
        schedule: after that: cosine (down to 0) | constant.
        batch_size: samples in a pass.
        accumulate: passes for one step, which the processes that torchrun started share.
        weight_decay: as in AdamW.
        max_grad_norm: of the gradient, which is scaled down to it; 0: no limit.
        gradient_checkpointing: compute activations again in the backward pass, to keep fewer of them.
        precision: of products: auto (float32, or bfloat16 where the weights are) | bfloat16. What is trained is kept
            in float32 either way.
        save_every: steps between checkpoints: what is lost at most when a run is killed.
        seed: of the order of samples, and of adapters.
        data: samples to train on, as the group `calibration` describes them; path null: the calibration set.
        unrelated: settings that a result does not depend on.
        reads_of_plan: names in a plan's `provenance` that `parts` reads; a result depends on their values.
    """

    steps: int | None = None
    budget_s: float | None = None
    learning_rate: float = 2e-4
    warmup: float = 0.03
    schedule: str = "cosine"
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    precision: str = "auto"
    save_every: int = 50
    seed: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    unrelated: ClassVar[tuple[str, ...]] = ("data", "save_every")
    reads_of_plan: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        one_of("recovery.schedule", self.schedule, ("cosine", "constant"))
        one_of("recovery.precision", self.precision, ("auto", "bfloat16"))
        check_count("recovery.save_every", self.save_every, least=1)
        check_count("recovery.seed", self.seed, most=LARGEST_SEED)
        for name in ("batch_size", "accumulate"):
            check_count(f"recovery.{name}", getattr(self, name), least=1, most=MOST_AT_ONCE)
        check_count(
            "recovery.steps", self.steps, most=MOST_STEPS, unless="those of budget_s, or one pass over the data"
        )
        check_number("recovery.budget_s", self.budget_s, above=0, unless="no limit")
        check_number("recovery.learning_rate", self.learning_rate, above=0)
        for name in ("weight_decay", "max_grad_norm"):
            check_number(f"recovery.{name}", getattr(self, name), least=0)
        check_number("recovery.warmup", self.warmup, least=0, below=1)

    def passes_of_each(self, processes: int) -> int:
        """Passes for one step that each of so many processes does.

        Raises:
            SvlError: if they cannot be shared out.
        """
        if self.accumulate % processes:
            raise SvlError(
                f"{processes} processes share the passes of a step, but recovery.accumulate is {self.accumulate}: set "
                f"it to a multiple of {processes} (and lower recovery.batch_size to leave the step as large as it is)"
            )
        return self.accumulate // processes

    @property
    def losses(self) -> Losses:
        """What is minimised; the answers' cross-entropy by default."""
        return Losses()

    @property
    def adapter(self) -> Adapter:
        """How linear modules are adapted, by those that adapt any."""
        return Adapter()

    @abstractmethod
    def parts(self, pruned: Lvlm, plan: Plan) -> Parts:
        """What is trained of the model that is left after `plan`.

        Raises:
            SvlError: if the model has no such part.
        """


def check_answers(samples: Samples) -> None:
    """Raise SvlError unless there are samples, all with an answer."""
    if not len(samples):
        raise SvlError("recovery.data has no samples to train on")
    samples.check_answered("recovery")
