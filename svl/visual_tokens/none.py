"""All visual tokens go through all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.models.lvlm import Lvlm
from svl.visual_tokens.base import VisualTokens


@dataclass(frozen=True)
class Every(VisualTokens):
    """No dropping of visual tokens."""

    does_nothing: ClassVar[bool] = True

    def apply(self, lvlm: Lvlm) -> Lvlm:
        """The model as it is."""
        return lvlm
