"""Weights stay in the precision they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.models.lvlm import Lvlm
from svl.quantization.base import Quantization


@dataclass(frozen=True)
class Full(Quantization):
    """No quantisation."""

    does_nothing: ClassVar[bool] = True

    def apply(self, lvlm: Lvlm) -> Lvlm:
        """The model as it is."""
        return lvlm
