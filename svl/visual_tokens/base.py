"""What a method that drops visual tokens is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svl.core import Method, Plan

if TYPE_CHECKING:
    from svl.models.lvlm import Lvlm


@dataclass(frozen=True)
class VisualTokens(Method, ABC):
    """Which visual tokens which layers see. It acts on the model that is left after pruning and compensation."""

    def check_plan(self, plan: Plan) -> None:
        """Raise SvlError if the method cannot act on what a plan leaves; asked before anything is evaluated."""

    @abstractmethod
    def apply(self, lvlm: Lvlm) -> Lvlm:
        """The model that drops visual tokens as it runs; called once for every model that is evaluated.

        A copy that shares all tensors: `lvlm` stays as it is. The copy takes the inputs that `lvlm` takes (prompts of
        several samples padded on the left, then generation with a cache), and gives out logits of the same shape.

        Raises:
            SvlError: if that is not possible for this model.
        """
