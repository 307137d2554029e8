"""Layer collapse (LaCo, arXiv 2402.11187): merge layers from the top down while the output stays similar.

The walk starts `size` layers below the `highest`. At layer l of the current model, the `size` - 1 layers after it are
merged into it; if the mean over samples of cos(vec(H), vec(H')) stays above the threshold (H: all states of a sample
after the final norm), the merge is kept and the walk goes `interval` layers down, else one. How many layers go is an
outcome of the threshold. Without one, the highest threshold that removes what the ratio asks for is searched for, by
bisection; the walk then ends as soon as that many are gone, the last merge being smaller where that is needed. The plan
says which threshold it was.

Two merges of weights exist (see `svl.core.merging`): the paper's formula, and that of the released code, which
keeps the last layer's weights alone (its issues 4 and 5). The plan only says what is merged; `compensation=merge` does
it.

Cost: one forward pass over `samples` per merge tried; a pass is remembered, so the search repeats none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, SvlError, check_count, one_of
from svl.core.merging import FORMULAS
from svl.strategies.merging import (
    Merges,
    Similarity,
    Walk,
    check_reach,
    check_threshold,
    like_all,
    plan_merges,
)


@dataclass(frozen=True)
class Laco(Strategy):
    """The walk.

    Attributes:
        merge: formula of merging: paper | released.
        threshold: similarity to stay above, from -1 to 1; null: search for the one that meets the ratio.
        size: layers that become one (C of the paper: 3 to 7).
        interval: layers to go down after a merge (I).
        highest: layer above the first merge tried (H), which stays; null: the last.
        lowest: lowest layer to merge into (L).
        samples: calibration samples that similarity is measured on; the paper has 2 to 5 sentences.
    """

    merge: str = "paper"
    threshold: float | None = None
    size: int = 3
    interval: int = 1
    highest: int | None = None
    lowest: int = 0
    samples: int | None = 5
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self) -> None:
        one_of("strategy.merge", self.merge, FORMULAS)
        check_threshold(self.threshold)
        check_count("strategy.size", self.size, least=2)
        check_count("strategy.interval", self.interval, least=1)
        check_count("strategy.highest", self.highest, unless="the last layer")
        check_count("strategy.lowest", self.lowest)
        check_count("strategy.samples", self.samples, least=1, unless="all")

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if there is no layer `highest`, or merging cannot remove so many layers."""
        highest = stats.n_layers - 1 if self.highest is None else self.highest
        nothing_asked = self.threshold is None and n_remove == 0
        if not (nothing_asked or self.lowest + self.size <= highest) or highest >= stats.n_layers:
            raise SvlError(
                f"strategy.size {self.size} does not fit between strategy.lowest {self.lowest} and the highest layer "
                f"{highest} of a model with layers 0..{stats.n_layers - 1}"
            )
        if self.threshold is None:
            check_reach(stats.n_layers, self._walk(stats, n_remove, like_all), n_remove)

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """The merges; with a threshold, as many as it lets pass, whatever the ratio.

        Raises:
            SvlError: if there is no layer `highest`, or merging cannot remove so many layers.
        """
        self.check(stats, n_remove)
        return plan_merges(
            stats,
            n_remove,
            lambda similarity: self._walk(stats, n_remove, similarity),
            formula=self.merge,
            threshold=self.threshold,
            samples=self.samples,
        )

    def _walk(self, stats: Stats, n_remove: int, similarity: Similarity) -> Walk:
        """The walk, as a function of its threshold and of the number of layers after which it ends."""
        n_layers = stats.n_layers
        highest = n_layers - 1 if self.highest is None else self.highest
        allowed = frozenset(stats.candidates(0 if self.threshold is not None else n_remove))

        def walk(threshold: float, most: int) -> Merges:
            alive, at = list(range(n_layers)), highest - self.size
            merges: Merges = ()
            while at >= self.lowest and n_layers - len(alive) < most:
                size = min(self.size, most - (n_layers - len(alive)) + 1)
                gone = tuple(alive[at + 1 : at + size])
                tried: Merges = (*merges, (alive[at], gone))
                possible = gone and allowed.issuperset(gone) and stats.can_merge(alive[at], gone)
                if possible and similarity(tried) > threshold:
                    merges, alive = tried, [i for i in alive if i not in gone]
                    at -= self.interval
                else:
                    at -= 1
            return merges

        return walk
