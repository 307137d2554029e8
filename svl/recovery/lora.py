"""LoRA on the decoder: adapters of low rank on linear modules of kept layers, trained on answers, merged afterwards."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svl.core import SvlError, check_count, check_number, one_of
from svl.recovery.base import Adapter, Parts, Recovery
from svl.recovery.modules import layers_beside_gaps, linear_modules, projector_tensors

if TYPE_CHECKING:
    from svl.core import Plan
    from svl.models.lvlm import Lvlm


@dataclass(frozen=True)
class Lora(Recovery):
    """Adapters, and the projector where it is asked for.

    Attributes:
        layers: that are adapted: kept (all) | gaps (those right before and behind removed ones).
        targets: their linear modules: all | attn | mlp. Experts are none.
        rank, alpha, dropout: of W + (alpha / rank) B A.
        projector: whether the projector, if the model has one, is trained beside.
    """

    layers: str = "kept"
    targets: str = "all"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    projector: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("peft") is None:
            raise SvlError("LoRA needs peft: pip install 'svl[recovery]', or choose recovery=projector or interlace")
        one_of("recovery.layers", self.layers, ("kept", "gaps"))
        one_of("recovery.targets", self.targets, ("all", "attn", "mlp"))
        check_count("recovery.rank", self.rank, least=1)
        check_count("recovery.alpha", self.alpha, least=1)
        check_number("recovery.dropout", self.dropout, least=0, below=1)

    @property
    def adapter(self) -> Adapter:
        """Rank, scale and dropout."""
        return Adapter(self.rank, self.alpha, self.dropout)

    def parts(self, pruned: Lvlm, plan: Plan) -> Parts:
        """Linear modules of the layers; parameters of the projector.

        Raises:
            SvlError: if no layer has anything that LoRA can attach to.
        """
        layers = plan.kept if self.layers == "kept" else layers_beside_gaps(plan)
        tensors = projector_tensors(pruned) if self.projector else ()
        return Parts(tensors, linear_modules(pruned, plan, layers, self.targets))
