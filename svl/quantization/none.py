"""Weights stay in the precision they have."""

from __future__ import annotations

from dataclasses import dataclass

from svl.loading import Lvlm


@dataclass(frozen=True)
class Full:
    """No quantisation."""

    def apply(self, lvlm: Lvlm) -> Lvlm:
        """The model as it is."""
        return lvlm
