"""Every token counts: for comparison with selectors that choose, and what ShortGPT does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svl.core import TokenSelector, TokenTrace


@dataclass(frozen=True)
class All(TokenSelector):
    """Every token of the sample."""

    def weights(self, trace: TokenTrace) -> Tensor:
        """Ones [T]."""
        return torch.ones(len(trace.visual))
