"""INTERLACE's training (arXiv 2511.19676): as many kept layers as are removed are trained whole, on answers.

Of each of its triplets, one of the first two layers goes and the other one is trained; the third is left as it is.
After other strategies, whose plans have no triplets, these are for each removed layer the nearest kept ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from svl.recovery.base import Parts, Recovery
from svl.recovery.modules import layer_tensors, layers_beside_gaps, nearest_kept

if TYPE_CHECKING:
    from svl.core import Plan
    from svl.models.lvlm import Lvlm


@dataclass(frozen=True)
class Interlace(Recovery):
    """Train the partners of removed layers; learning rate, batch and warm-up are those of the authors' script."""

    learning_rate: float = 1e-5
    batch_size: int = 16
    accumulate: int = 2
    reads_of_plan: ClassVar[tuple[str, ...]] = ("partners",)

    def parts(self, pruned: Lvlm, plan: Plan) -> Parts:
        """All parameters of these layers: those that the strategy names as `partners`, or the nearest ones."""
        named = [i for i in plan.provenance.get("partners") or () if i in plan.kept]
        partners = named or nearest_kept(plan) or layers_beside_gaps(plan)
        return Parts(layer_tensors(pruned, plan, partners))
