"""Visual tokens only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from svl.core import TokenSelector, TokenTrace


@dataclass(frozen=True)
class Visual(TokenSelector):
    """Visual tokens only."""

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for visual tokens [T]."""
        return trace.visual.float()
