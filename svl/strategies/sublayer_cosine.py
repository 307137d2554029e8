"""Attention and MLPs that turn the stream least (LLM-Drop, arXiv 2406.15786, the finer variants).

With f what attention, or the MLP, adds to the residual stream x, the n sub-layers of largest mean cos(x, x + f(x)) over
the selected tokens (the paper's: all) go, in one shot: only attention, only MLPs, or the best of both in one sort. The
number that go is that of layers which the ratio asks for; a layer that loses both is removed.

In memory they are left out; see `removed_attn` in docs/methods.md for exports. Models that normalise what a sub-layer
writes, or scale it, are refused. Cost: one calibration pass with the statistic "sublayers".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import ROLES, Plan, Stats, Strategy, check_targets


@dataclass(frozen=True)
class SublayerCosine(Strategy):
    """Sub-layers of largest cosine.

    Attributes:
        targets: which may go: attn, mlp, or both.
    """

    targets: tuple[str, ...] = ("attn", "mlp")
    needs: ClassVar[frozenset[str]] = frozenset({"sublayers"})
    sublayers_for_one: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_targets("strategy.targets", self.targets)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Remove `n_remove` sub-layers of removable layers; of equals the deeper goes first. There is no importance."""
        layers, cosines = stats.candidates(n_remove), stats.sublayers().tolist()
        both = [(cosines[ROLES.index(role)][i], i, role) for i in layers for role in self.targets]
        chosen = sorted(both, reverse=True)[:n_remove]
        attn, mlp = (tuple(i for _, i, role in chosen if role == wanted) for wanted in ROLES)
        return Plan(stats.n_layers, (), removed_attn=attn, removed_mlp=mlp)
