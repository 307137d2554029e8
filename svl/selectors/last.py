"""The last token only, as angular-distance methods use it (arXiv 2403.17887)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svl.core import TokenSelector, TokenTrace


@dataclass(frozen=True)
class Last(TokenSelector):
    """The last token only, as angular-distance methods use. With a chat template it is a constant template token."""

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for the last token [T]."""
        weights = torch.zeros(len(trace.visual))
        weights[-1] = 1
        return weights
