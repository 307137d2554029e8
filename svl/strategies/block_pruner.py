"""Greedy removal of attentions and MLPs by loss (BlockPruner, arXiv 2406.10594).

Every attention and every MLP still there is switched off in turn, and the one that is missed least goes; of equals the
first, attentions before MLPs. The ratio counts halves of layers: 2 n blocks go for n layers, and a layer that loses
both is removed. The loss is that of the calibration set's answer tokens, of plain text every next token; the paper's
perplexity is its exponential.

Cost for B = 2 n of 2 L blocks, all removable: sum over steps k < B of (2 L - k) losses, e.g. 805 for 14 of 64. They
take about half of as many forward passes (see `svl.calibration.sublayer_sweep`), and each is kept in the store, so that
a longer search continues a shorter one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import ROLES, Plan, Stats, Strategy, SvlError, check_count, check_targets


@dataclass(frozen=True)
class BlockPruner(Strategy):
    """Greedy search over blocks.

    Attributes:
        targets: which may go: attn, mlp, or both.
        samples: calibration samples that losses are measured on (null: all).
    """

    targets: tuple[str, ...] = ("attn", "mlp")
    samples: int | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self) -> None:
        check_targets("strategy.targets", self.targets)
        check_count("strategy.samples", self.samples, least=1, unless="all")

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if there are fewer than 2 `n_remove` blocks."""
        blocks = len(self.targets) * len(stats.candidates(n_remove))
        if 2 * n_remove > blocks:
            raise SvlError(f"cannot remove {2 * n_remove} blocks: only {blocks} of {self.targets} may go")

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Remove 2 `n_remove` blocks of removable layers; there is no importance.

        Raises:
            SvlError: if there are fewer, or no layer would be left.
        """
        self.check(stats, n_remove)
        probe = stats.required_probe().with_samples(self.samples)
        blocks: list[tuple[int, str]] = [
            (i, role) for role in ROLES if role in self.targets for i in stats.candidates(n_remove)
        ]
        removed: list[tuple[int, str]] = []
        for _ in range(2 * n_remove):
            _, losses = probe.sublayer_losses(removed, [block for block in blocks if block not in removed])
            removed.append(min(losses, key=lambda block: (losses[block], blocks.index(block))))
        attn, mlp = (tuple(i for i, found in removed if found == role) for role in ROLES)
        return Plan(stats.n_layers, (), removed_attn=attn, removed_mlp=mlp)
