"""Means over tokens against means over samples, token by token in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from svl.calibration.calibrate import window_cosines
from svl.core import Stats, SvlError, TokenSelector, TokenTrace
from svl.selectors.all_tokens import All
from svl.strategies.interlace import Interlace
from svl.strategies.lorp import Lorp, pairwise_similarity
from svl.strategies.streamline import Streamline

LAYERS, LENGTHS = 6, (2, 9, 1, 5)


class Layered(TokenSelector):
    """Weights that differ by layer and token; the third sample has none."""

    def weights(self, trace):
        n = len(trace.visual)
        weights = torch.rand(LAYERS, n, generator=torch.Generator().manual_seed(trace.index))
        return weights * (trace.index != 2)


def made(selector) -> tuple[list[torch.Tensor], Stats]:
    """Streams [L + 1, T, d] of samples of unequal lengths, and what calibration measures on them."""
    chance = torch.Generator().manual_seed(7)
    streams = [torch.randn(LAYERS + 1, n, 8, generator=chance).cumsum(0) for n in LENGTHS]
    traces = [TokenTrace(k, torch.zeros(h.shape[1], dtype=torch.bool), windows=window_cosines(list(h[:, None]))[0])
              for k, h in enumerate(streams)]  # fmt: skip
    return streams, Stats(LAYERS, tuple(range(LAYERS)), traces, selector)


def slow(streams, stats, i, j, over, transform) -> float:
    """A mean of transform(cos(h_i, h_j)), in the plainest terms."""
    sums = []
    for h, trace in zip(streams, stats.traces, strict=True):
        weights = stats.selector.weights(trace)
        mine = (weights[i] if weights.ndim == 2 else weights).tolist()
        values = [transform(float(F.cosine_similarity(h[i, t], h[j, t], dim=0))) for t in range(h.shape[1])]
        sums.append((sum(w * v for w, v in zip(mine, values, strict=True)), sum(mine)))
    if over == "tokens":
        return sum(total for total, _ in sums) / sum(weight for _, weight in sums)
    means = [total / weight for total, weight in sums if weight > 0]
    return sum(means) / len(means)


@pytest.mark.parametrize("over", ["tokens", "samples"])
@pytest.mark.parametrize("selector", [All(), Layered()], ids=["all", "layered"])
def test_a_mean_is_what_it_says(selector, over):
    streams, stats = made(selector)
    found = stats.windows(over=over)
    angles = stats.windows(lambda cosine: cosine.clamp(-1, 1).arccos() / math.pi, over)
    for i in range(LAYERS):
        for j in range(i + 1, LAYERS + 1):
            assert float(found[i, j]) == pytest.approx(slow(streams, stats, i, j, over, lambda c: c), abs=1e-6)
            angle = slow(streams, stats, i, j, over, lambda c: math.acos(max(-1, min(1, c))) / math.pi)
            assert float(angles[i, j]) == pytest.approx(angle, abs=1e-5)
    assert pairwise_similarity(stats, over)[1][4] == float(found[1, 4])


def test_samples_weigh_alike_whatever_their_length():
    """One long sample says layer 1, two short ones layer 0: tokens are with the first, samples with the others."""

    def trace(index, n, cosines):
        pairs = torch.zeros(6, n)  # (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)
        pairs[[0, 3, 5]] = torch.tensor(cosines)[:, None].expand(-1, n)
        return TokenTrace(index, torch.zeros(n, dtype=torch.bool), windows=pairs)

    traces = [trace(0, 10, [0.5, 0.9, 0.1]), trace(1, 1, [0.9, 0.5, 0.1]), trace(2, 1, [0.9, 0.5, 0.1])]
    stats = Stats(3, (0, 1, 2), traces, All())
    assert Streamline().plan(stats, 1).removed == (1,)
    assert Streamline(mean="samples").plan(stats, 1).removed == (0,)
    assert Streamline(mean="samples").plan(stats, 1).importance == pytest.approx((1 - 2.3 / 3, 1 - 1.9 / 3, 0.9))
    assert Interlace().plan(stats, 1).importance == pytest.approx((1 - 6.8 / 12, 1 - 10 / 12, 0.9))
    assert Interlace(mean="samples").plan(stats, 1).importance == pytest.approx((1 - 2.3 / 3, 1 - 1.9 / 3, 0.9))
    assert Interlace(mean="samples").plan(stats, 1).removed == (0,)
    assert Interlace().plan(stats, 1).removed == (1,)


def test_lorp_reads_the_mean_that_it_is_set_to():
    _, stats = made(All())
    pooled, of_samples = (Lorp(mean=mean).plan(stats, 2) for mean in ("tokens", "samples"))
    assert pooled.provenance["locality"] != of_samples.provenance["locality"]


@pytest.mark.parametrize("cls", [Streamline, Interlace, Lorp])
def test_another_mean_is_refused(cls):
    with pytest.raises(SvlError, match=r"strategy\.mean is 'token', but must be one of: tokens, samples"):
        cls(mean="token")
