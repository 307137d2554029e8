"""Text tokens only, those of the template included."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from svl.core import TokenSelector, TokenTrace


@dataclass(frozen=True)
class Text(TokenSelector):
    """Text tokens only (template tokens included)."""

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for text tokens [T]."""
        return (~trace.visual).float()
