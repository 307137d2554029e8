"""Random tokens: the control for every informed selector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svl.core import TokenSelector, TokenTrace, check_count, check_number


@dataclass(frozen=True)
class Random(TokenSelector):
    """A random fraction `p` of the tokens, by seed and sample: the control for every informed selector."""

    p: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("selector.p", self.p, above=0, most=1)
        check_count("selector.seed", self.seed)

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for ceil(p T) random tokens [T]."""
        n = len(trace.visual)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + trace.index)
        weights = torch.zeros(n)
        weights[torch.randperm(n, generator=generator)[: max(1, math.ceil(round(self.p * n, 6)))]] = 1
        return weights
