"""All visual tokens go through all layers."""

from __future__ import annotations

from dataclasses import dataclass

from svl.loading import Lvlm


@dataclass(frozen=True)
class Every:
    """No dropping of visual tokens."""

    def apply(self, lvlm: Lvlm) -> Lvlm:
        """The model as it is."""
        return lvlm
