"""Layer collapse (LaCo, arXiv 2402.11187): merge layers from the top down while the output stays similar.

The walk starts `size` layers below the `highest`. At layer l of the current model, the `size` - 1 layers after it are
merged into it; if the mean over samples of cos(vec(H), vec(H')) stays above the threshold (H: all states of a sample
after the final norm), the merge is kept and the walk goes `interval` layers down, else one. How many layers go is an
outcome of the threshold. Without one, the highest threshold that removes what the ratio asks for is searched for, by
bisection; the walk then ends as soon as that many are gone, the last merge being smaller where that is needed. The plan
says which threshold it was.

Two merges of weights exist (see `core.blends`): the paper's formula, and that of the released code, which keeps the
last layer's weights alone (its issues 4 and 5). The plan only says what is merged; `compensation=merge` does it.

Cost: one forward pass over `samples` per merge tried; a pass is remembered, so the search repeats none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from svl.core import Patch, Plan, Stats, SvlError, blends, one_of

Merges = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Laco:
    """The walk.

    Attributes:
        merge: formula of merging: paper | released.
        threshold: similarity to stay above; null: search for the one that meets the ratio.
        size: layers that become one (C of the paper: 3 to 7).
        interval: layers to go down after a merge (I).
        highest: layer above the first merge tried (H), which stays; null: the last.
        lowest: lowest layer to merge into (L).
        samples: calibration samples that similarity is measured on; the paper has 2 to 5 sentences.
    """

    merge: str = "released"
    threshold: float | None = None
    size: int = 3
    interval: int = 1
    highest: int | None = None
    lowest: int = 0
    samples: int | None = 5
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self) -> None:
        one_of("strategy.merge", self.merge, ("paper", "released"))
        if self.size < 2 or self.interval < 1:
            raise SvlError("strategy.size must be at least 2 and strategy.interval at least 1")

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """The merges; with a threshold, as many as it lets pass, whatever the ratio.

        Raises:
            SvlError: if there is no layer `highest`, or merging cannot remove so many layers.
        """
        probe, n_layers = stats.model().take(self.samples), stats.n_layers
        highest = n_layers - 1 if self.highest is None else self.highest
        if not self.lowest + self.size <= highest < n_layers:
            raise SvlError(
                f"strategy.size {self.size} does not fit between strategy.lowest {self.lowest} and the highest layer "
                f"{highest} of a model with layers 0..{n_layers - 1}"
            )
        allowed = frozenset(stats.candidates(0 if self.threshold is not None else n_remove))

        @cache
        def similarity(merges: Merges) -> float:
            return probe.similarity(_plan(n_layers, merges), Patch(blends=blends(merges, self.merge)))

        def walk(threshold: float, most: int) -> Merges:
            alive, at = list(range(n_layers)), highest - self.size
            merges: Merges = ()
            while at >= self.lowest and n_layers - len(alive) < most:
                size = min(self.size, most - (n_layers - len(alive)) + 1)
                gone = tuple(alive[at + 1 : at + size])
                tried: Merges = (*merges, (alive[at], gone))
                if gone and allowed.issuperset(gone) and similarity(tried) > threshold:
                    merges, alive = tried, [i for i in alive if i not in gone]
                    at -= self.interval
                else:
                    at -= 1
            return merges

        if self.threshold is not None:
            return _plan(n_layers, walk(self.threshold, n_layers - 1), threshold=self.threshold)
        low, high, best = -1.0, 1.0, walk(-1.0, n_remove)
        for _ in range(STEPS):
            middle = (low + high) / 2
            merges = walk(middle, n_remove)
            if len(_plan(n_layers, merges).removed) == n_remove:
                low, best = middle, merges
            else:
                high = middle
        plan = _plan(n_layers, best, threshold=low)
        if len(plan.removed) < n_remove:
            raise SvlError(f"merging reaches {len(plan.removed)} removed layers only, not {n_remove}")
        return plan


STEPS = 10  # of bisection: thresholds to 0.002


def _plan(n_layers: int, merges: Merges, **made: float) -> Plan:
    return Plan(n_layers, tuple(i for _, gone in merges for i in gone), merges=merges, provenance=made)
