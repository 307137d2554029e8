"""Strategies that compare hidden states: their formulas by brute force, numbers that their authors give."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select, window_cosines
from svl.core import Stats, SvlError, TokenTrace
from svl.selectors.all_tokens import All
from svl.selectors.last import Last
from svl.strategies.angular import Angular
from svl.strategies.cosine import Cosine
from svl.strategies.interlace import Interlace
from svl.strategies.runs import Runs
from svl.strategies.spaced import Spaced
from svl.strategies.streamline import Streamline

# BI of LLaMA-2-7B on OpenWebText, published with arXiv 2407.16286.
BI = (
    ".4066 .2499 .1454 .1462 .1515 .1501 .1436 .1420 .1339 .1287 .1248 .1131 .1092 .1100 .1058 .1059 "
    ".1062 .0839 .0756 .0637 .0616 .0466 .0440 .0365 .0347 .0308 .0332 .0299 .0332 .0337 .0603 .3072"
)  # fmt: skip


def states(layers: int, tokens: int, seed: int = 0, width: int = 8) -> torch.Tensor:
    """A random residual stream [L + 1, T, d] in small steps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers + 1, tokens, width, generator=generator).cumsum(0)


def windowed(h: torch.Tensor, selector=None) -> Stats:
    """What calibration measures on a stream: cosines of neighbours and of all pairs."""
    pairs = window_cosines(list(h[:, None]))[0]
    trace = TokenTrace(0, torch.zeros(h.shape[1], dtype=torch.bool), F.cosine_similarity(h[:-1], h[1:], dim=-1), pairs)
    return Stats(len(h) - 1, tuple(range(len(h) - 1)), (trace,), selector or All())


def test_shortgpt_removes_the_layers_it_publishes():
    importance = [float(x) for x in BI.split()]
    assert Stats(32, tuple(range(32))).plan(importance, 9).removed == tuple(range(21, 30))


@pytest.mark.parametrize("n", [0, 1, 2, 4, 6, 8])
@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_best_of_all_sets(n, seed):
    h, depth, spared = states(9, 7, seed).double(), 9, {0, 7} if seed % 2 else set()
    stats = windowed(h).without(spared)

    def cost(removed: tuple[int, ...]) -> float:
        kept = [-1, *(i for i in range(depth) if i not in removed), depth]
        gaps = [(a + 1, b) for a, b in itertools.pairwise(kept) if b - a > 1]
        return sum(1 - float(F.cosine_similarity(h[a], h[b], dim=-1).mean()) for a, b in gaps)

    if n > depth - len(spared):
        with pytest.raises(SvlError, match="at most 7 may go"):
            Runs().plan(stats, n)
        return
    choices = [c for c in itertools.combinations(range(depth), n) if not spared & set(c)]
    assert Runs().plan(stats, n).removed == min(choices, key=cost)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_windows_are_found_as_by_brute_force(n, seed):
    h, depth = states(9, 7, seed).double(), 9
    angle = {
        s: sum(math.acos(F.cosine_similarity(h[s, t], h[s + n, t], dim=0)) for t in range(7))
        for s in range(depth - n + 1)
    }
    similarity = {s: F.cosine_similarity(h[s], h[s + n], dim=-1).mean() for s in range(depth - n + 1)}
    last = {s: math.acos(F.cosine_similarity(h[s, -1], h[s + n, -1], dim=0)) for s in range(1, depth - n + 1)}

    def block(start):
        return tuple(range(start, start + n))

    assert Angular(first=0).plan(windowed(h), n).removed == block(min(angle, key=angle.get))
    assert Angular().plan(windowed(h, Last()), n).removed == block(min(last, key=last.get))
    assert Streamline().plan(windowed(h), n).removed == block(max(similarity, key=similarity.get))


def test_windows_of_a_model_are_those_of_its_states(lm, samples):
    stats = select(calibrate(lm, samples, statistics=("windows",), batch_size=3), All())
    total, tokens = torch.zeros(5, 5, dtype=torch.float64), 0
    for sample in Activations(lm, samples, stats).stream(range(5)):
        h = torch.stack([sample.h(i) for i in range(5)]).double()
        total += F.cosine_similarity(h[:, None], h[None], dim=-1).sum(-1)
        tokens += h.shape[1]
    measured = stats.windows()
    assert measured.isnan().sum() == 15
    torch.testing.assert_close(measured.nan_to_num(), (total / tokens).triu(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.diagonal(1), select(calibrate(lm, samples), All()).cosine(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_massive_activations_neither_overflow_nor_vanish(dtype):
    """In fp16, dot products of such states are inf / inf, which some codes turn into a similarity of 0.5."""
    h = states(4, 6, width=64)
    h[:, 0, 3] = torch.tensor([6e4, 6e4, 5.9e4, 6e4, 5e4])
    h[:, 2] *= 1e-3
    h = h.to(dtype)
    exact = F.cosine_similarity(h[:, None].double(), h[None].double(), dim=-1)
    found = window_cosines(list(h[:, None]))[0]
    i, j = torch.triu_indices(5, 5, 1)
    torch.testing.assert_close(found.double(), exact[i, j], atol=1e-5, rtol=0)


def test_windows_avoid_protected_layers():
    stats = replace(windowed(states(6, 5)), removable=(0, 1, 3, 4, 5))
    assert set(Streamline().plan(stats, 3).removed) == {3, 4, 5}
    with pytest.raises(SvlError, match="no 4 layers in a row"):
        Streamline().plan(stats, 4)


@pytest.mark.parametrize("seed", range(4))
def test_spaced_layers_are_the_cheapest_that_keep_their_distance(seed):
    stats = windowed(states(9, 5, seed))
    importance = (1 - stats.cosine()).tolist()
    for gap, n in itertools.product(range(3), range(1, 4)):
        sets = [s for s in itertools.combinations(range(9), n) if all(b - a > gap for a, b in itertools.pairwise(s))]
        assert Spaced(gap).plan(stats, n).removed == min(sets, key=lambda s: sum(importance[i] for i in s))
    assert Spaced(0).plan(stats, 4).removed == Cosine().plan(stats, 4).removed


def test_a_gap_that_shrinks_is_told(caplog):
    stats = replace(windowed(states(9, 5)), removable=(0, 1, 2, 4, 5, 8))
    plan = Spaced(3).plan(stats, 3)
    assert (plan.removed, plan.provenance["gap"], caplog.messages) == ((0, 4, 8), 3, [])
    for n, gap in {4: 1, 5: 0}.items():
        caplog.clear()
        plan = Spaced(3).plan(stats, n)
        assert (len(plan.removed), plan.provenance["gap"]) == (n, gap)
        assert all(b - a > gap for a, b in itertools.pairwise(plan.removed))
        assert caplog.messages == [f"  strategy.gap is 3, but {n} layers do not fit that far apart: it is {gap}"]


@pytest.mark.parametrize("seed", range(4))
def test_interlace_takes_one_layer_of_every_triplet(seed):
    h = states(12, 5, seed)
    stats, cosine = windowed(h), windowed(h).windows()
    first = max(range(9), key=lambda i: cosine[i, i + 3])
    single = Interlace().plan(stats, 1).removed
    assert single == (max((first, first + 1), key=lambda i: cosine[i, i + 1]),)
    for n in range(1, 4):
        removed = Interlace().plan(stats, n).removed
        assert all(b - a > 1 for a, b in itertools.pairwise(removed))
    assert len(Interlace().plan(stats, 9).removed) == 9


def of_table(n_layers: int, cosines: dict[tuple[int, int], float]) -> Stats:
    """Statistics of one token with these cosines of h_i and h_j; all others are 0.1."""
    pairs = itertools.combinations(range(n_layers + 1), 2)
    windows = torch.tensor([[cosines.get(pair, 0.1)] for pair in pairs])
    trace = TokenTrace(0, torch.zeros(1, dtype=torch.bool), windows=windows)
    return Stats(n_layers, tuple(range(n_layers)), (trace,), All())


def test_interlace_by_hand():
    """Of the triplets, [0, 3) and [4, 7) are most alike; then the pair [7, 9), at last single layers."""
    of_layer = (0.5, 0.8, 0.9, 0.4, 0.7, 0.6, 0.9, 0.3, 0.6, 0.2)
    single = {(i, i + 1): cosine for i, cosine in enumerate(of_layer)}
    stats = of_table(10, {**single, (0, 3): 0.9, (4, 7): 0.8, (7, 9): 0.7})
    assert Interlace().plan(stats, 1).removed == (1,)  # more similar than 0; 2 is never the one
    assert Interlace().plan(stats, 2).removed == (1, 4)
    assert Interlace().plan(stats, 3).removed == (1, 4, 8)  # the more similar one of the pair, not the first
    assert Interlace().plan(stats, 4).removed == (1, 3, 4, 8)
    overlapping = of_table(10, {**single, (0, 3): 0.9, (4, 7): 0.8, (3, 6): 0.95})
    assert Interlace().plan(overlapping, 2).removed == (1, 4)  # [3, 6) comes first, and leaves no room for [4, 7)


def test_one_calibration_serves_every_method(llava, samples):
    forwards = []
    handle = llava.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    stats = calibrate(llava, samples, batch_size=2)
    for selector in (All(), Last()):
        for strategy in (Cosine(), Angular(), Streamline(), Interlace(), Spaced()):
            for n in (1, 2):
                strategy.plan(select(stats, selector), n)
    handle.remove()
    assert len(forwards) == 3  # batches of one pass
