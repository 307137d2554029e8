"""Sliding-window merging (SWM, arXiv 2502.19159): windows of layers become one while the output stays similar.

From the layer below the last one down, a window grows by one layer at a time. If, with the window merged into its
lowest layer, the mean over samples of cos(vec(H), vec(H')) stays above the threshold (H: all states of a sample after
the final norm), it grows on; else the window without that layer is merged for good, and the next one starts below it.
How many layers go is an outcome of the threshold (0.72 in the paper). Without one, the highest threshold that removes
what the ratio asks for is searched for, by bisection; the walk then ends as soon as that many are gone.

The paper's weights are W_l + sum_k (W_{l_k} - W_l), as in LaCo. As released, differences to the running sum are added,
which leaves the weights of the window's highest layer alone, and a window that has grown down to layer 0 is not merged.
Norms are those of the lowest layer in both. The plan says what is merged; `compensation=merge` does it.

Cost: one forward pass over `samples` per window tried; a pass is remembered, so the search repeats none.
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
class Swm(Strategy):
    """The walk.

    Attributes:
        merge: formula of merging: paper | released.
        threshold: similarity to stay above, from -1 to 1; None: search for the one that meets the ratio.
        highest: highest layer of the first window; None: the one below the last.
        samples: calibration samples that similarity is measured on; the paper has 10 texts of 128 tokens.
    """

    merge: str = "paper"
    threshold: float | None = None
    highest: int | None = None
    samples: int | None = 10
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self) -> None:
        one_of("strategy.merge", self.merge, FORMULAS)
        check_threshold(self.threshold)
        check_count("strategy.highest", self.highest, unless="the one below the last")
        check_count("strategy.samples", self.samples, least=1, unless="all")

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if there is no layer `highest`, or merging cannot remove so many layers."""
        if self.highest is not None and self.highest >= stats.n_layers:
            raise SvlError(f"strategy.highest is {self.highest}, but the model has layers 0..{stats.n_layers - 1}")
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
        highest = stats.n_layers - 2 if self.highest is None else self.highest
        allowed = frozenset(stats.candidates(0 if self.threshold is not None else n_remove))

        def walk(threshold: float, most: int) -> Merges:
            merges: Merges = ()
            high, left = highest, most
            while high > 0 and left > 0:
                low = high
                window: Merges = ()  # one merge, of low + 1 .. high into low; none as long as the window is one layer
                while low > 0 and low in allowed and high - low < left:
                    larger = ((low - 1, tuple(range(low, high + 1))),)
                    if not stats.can_merge(*larger[0]) or similarity(merges + larger) <= threshold:
                        break
                    low, window = low - 1, larger
                if low > 0 or self.merge == "paper":
                    merges += window
                    left -= high - low
                high = low - 1
            return merges

        return walk
