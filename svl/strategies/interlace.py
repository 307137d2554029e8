"""Disjoint triplets (INTERLACE, arXiv 2511.19676), layer selection only: `recovery=interlace` is its fine-tuning.

Triplets [i, i + 3) are taken greedily by mean cos(h_i, h_{i+3}) over the selected tokens, each disjoint from those
before. From each goes layer i or i + 1, whichever has the more similar input and output; the paper then trains the
other one and freezes layer i + 2. Where triplets run out, the more similar layer of pairs [i, i + 2) goes, then single
layers go.

Cost: one calibration pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, one_of


@dataclass(frozen=True)
class Interlace(Strategy):
    """One layer out of every triplet, so that no two neighbours go.

    Attributes:
        mean: tokens (of all samples, pooled) | samples (mean of the samples' means, as released).
    """

    mean: str = "tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"windows"})

    def __post_init__(self) -> None:
        one_of("strategy.mean", self.mean, ("tokens", "samples"))

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: 1 - cosine across each single layer. Its provenance names `partners`, which the paper trains."""
        allowed, cosine = set(stats.candidates(n_remove)), stats.windows(over=self.mean)
        single = cosine.diagonal(1).tolist()
        removed: list[int] = []
        partners: list[int] = []
        taken: set[int] = set()
        for size in (3, 2, 1):
            # Of several layers, windows that end on h_L are not looked at.
            starts = stats.n_layers if size == 1 else stats.n_layers - size
            for start in sorted(range(starts), key=lambda i: -float(cosine[i, i + size])):
                window = range(start, start + size)
                if len(removed) == n_remove or taken.intersection(window):
                    continue
                if choice := [i for i in window[:2] if i in allowed]:
                    removed.append(max(choice, key=lambda i: single[i]))
                    partners += [i for i in window[:2] if i != removed[-1]]
                    taken.update(window)
        left = sorted(allowed.difference(removed), key=lambda i: -single[i])  # every window touches a taken one
        removed += left[: n_remove - len(removed)]
        origin = {"partners": sorted(set(partners) - set(removed))}
        return Plan(stats.n_layers, tuple(removed), tuple(1 - c for c in single), provenance=origin)
