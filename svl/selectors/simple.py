"""Selectors that need no measurement: all, visual, text, last and random tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svl.core import SvlError, TokenTrace


@dataclass(frozen=True)
class All:
    """Every token of the sample."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def weights(self, trace: TokenTrace) -> Tensor:
        """Ones [T]."""
        return torch.ones(len(trace.visual))


@dataclass(frozen=True)
class Visual:
    """Visual tokens only."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for visual tokens [T]."""
        return trace.visual.float()


@dataclass(frozen=True)
class Text:
    """Text tokens only (template tokens included)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for text tokens [T]."""
        return (~trace.visual).float()


@dataclass(frozen=True)
class Last:
    """The last token only, as angular-distance methods use. With a chat template it is a constant template token."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for the last token [T]."""
        weights = torch.zeros(len(trace.visual))
        weights[-1] = 1
        return weights


@dataclass(frozen=True)
class Random:
    """A random fraction `p` of the tokens, by seed and sample: the control for every informed selector."""

    p: float = 0.5
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise SvlError(f"selector.p is {self.p}, but must lie in (0, 1]")

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for ceil(p T) random tokens [T]."""
        n = len(trace.visual)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + trace.index)
        weights = torch.zeros(n)
        weights[torch.randperm(n, generator=generator)[: max(1, math.ceil(round(self.p * n, 6)))]] = 1
        return weights
