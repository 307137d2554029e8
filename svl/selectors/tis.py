"""Token Importance Scores (TIS): the vision-language tokens that attention says matter.

Short-LVLM (arXiv 2507.23362), stage (a). With A the attention matrix averaged over heads, V the visual and S the
textual tokens, the score of

* visual token j: mean of (average of A[v, j] over visual queries v) and (average of A[s, j] over textual queries s);
* textual token i: mean of (average of A[i, v] over visual keys v) and its textual self-attention.

The paper's figure leaves several choices open; each is a setting here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svl.core import SvlError, TokenSelector, TokenTrace, check_count, check_number, one_of


@dataclass(frozen=True)
class Tis(TokenSelector):
    """The most important tokens by TIS.

    Attributes:
        p: how many: a fraction of the tokens (`rule=fraction`) or of the total score (`rule=nucleus`).
        rule: fraction | nucleus.
        pool: joint (one ranking of both modalities, as the paper's figure shows) | modality (p of each).
        layers: mean (attention averaged over layers) | each (every layer by its own attention) | a layer number, which
            is the dense model's.
        text_self: received (average of A[s, i] over textual queries) | emitted (of A[i, s] over textual keys).
        visible: average over the queries (keys) that can see (be seen by) the token; False averages over all of the
            modality, which under a causal mask favours early tokens.
        skip: tokens at the start of every sample that are never chosen, and that `p` does not count: attention sinks,
            or a system prompt by its length.
    """

    p: float = 0.5
    rule: str = "fraction"
    pool: str = "joint"
    layers: str = "mean"
    text_self: str = "received"
    visible: bool = True
    skip: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        one_of("selector.rule", self.rule, ("fraction", "nucleus"))
        one_of("selector.pool", self.pool, ("joint", "modality"))
        one_of("selector.text_self", self.text_self, ("received", "emitted"))
        if not str(self.layers).isdigit():
            one_of("selector.layers", self.layers, ("mean", "each", "<layer number>"))
        check_number("selector.p", self.p, above=0, most=1)
        check_count("selector.skip", self.skip)

    def scores(self, trace: TokenTrace) -> Tensor:
        """Importance of every token: fp64 [T], or [L, T] with `layers=each`.

        Raises:
            SvlError: if attention was not measured, or the layer does not exist, or no more.
        """
        if trace.received is None or trace.emitted is None or trace.queries is None or trace.keys is None:
            raise SvlError("calibration did not measure 'attention', which selector 'tis' needs")
        visual = trace.visual
        size = torch.stack([visual.sum(), (~visual).sum()]).double()[None, :, None]
        queries = trace.queries.double() if self.visible else size
        keys = trace.keys.double() if self.visible else size
        # A token that nothing can look at, or that can look at nothing (0 / 0), has no such attention: 0.
        received = torch.where(queries > 0, trace.received.double() / queries.clamp(min=1), 0)
        emitted = torch.where(keys > 0, trace.emitted.double() / keys.clamp(min=1), 0)
        of_visual = (received[:, 0] + received[:, 1]) / 2
        self_attention = received[:, 1] if self.text_self == "received" else emitted[:, 1]
        of_text = (emitted[:, 0] + self_attention) / 2
        scores = torch.where(visual, of_visual, of_text)
        if self.layers == "each":
            return scores
        if self.layers == "mean":
            return scores.mean(0)
        return scores[trace.row_of(int(self.layers), len(scores), "selector.layers")]

    def weights(self, trace: TokenTrace) -> Tensor:
        """1 for important tokens: [T], or [L, T] with `layers=each`."""
        scores = self.scores(trace)
        if scores.ndim == 2:
            return torch.stack([self._top(row, trace.visual) for row in scores])
        return self._top(scores, trace.visual)

    def _top(self, scores: Tensor, visual: Tensor) -> Tensor:
        """0/1 marks [T] of the top tokens; of equals (to five digits) the earlier one is taken."""
        marks = torch.zeros(len(scores))
        late = torch.arange(len(scores), device=visual.device) >= self.skip
        pools = [visual & late, ~visual & late] if self.pool == "modality" else [late]
        for pool in pools:
            members = pool.nonzero()[:, 0]
            if len(members) == 0:
                continue
            members = members[scores[members].log().round(decimals=5).sort(descending=True, stable=True).indices]
            if self.rule == "fraction":
                n = max(1, math.ceil(round(self.p * len(members), 6)))
            else:
                share = scores[members].cumsum(0) / scores[members].sum()
                n = min(len(members), int((share < self.p - 1e-12).sum()) + 1)
            marks[members[:n]] = 1
        return marks
