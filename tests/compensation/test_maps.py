"""Compensations that map what a layer writes onto the gap."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.linear import Linear
from svl.compensation.linear_cosine import LinearCosine
from svl.compensation.mean_update import MeanUpdate
from svl.core import Patch, Plan, SvlError
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All


class Stream:
    """Hidden states of one removed layer (1 of 3) whose effect is given; layer 0 writes M."""

    n_layers, writers = 3, ("attn", "mlp")
    generated = False

    def __init__(self, written, gap, weights=None, bias=False):
        self.weights = (torch.ones(len(written)) if weights is None else weights).expand(self.n_layers, -1)
        self.written, self.gap, self.bias = written, gap, bias
        self.before = torch.randn(written.shape, generator=torch.Generator().manual_seed(9))

    def has_bias(self, layer, writer):
        return self.bias

    def stream_factor(self, layer, writer):
        return 1.0

    def stream(self, points=(), writers=(), plan=None, patch=None):
        assert (set(points), list(writers)) == ({1, 2}, [(0, "mlp")])
        yield self

    def h(self, i):
        return self.before if i == 1 else self.before + self.gap

    def wrote(self, layer, writer):
        return self.written


def rows(n, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


PLAN = Plan(3, (1,))


@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_least_squares_finds_a_gap_that_is_linear(shrink):
    written, change = rows(200), rows(16, seed=1) / 4
    patch = Linear(ridge=0, shrink=shrink).fit(Stream(written, written @ change), PLAN)
    torch.testing.assert_close(patch.updates[0, "mlp"].left, change.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_a_removed_layer_that_is_linear_is_replaced_exactly(shrink, llama, make_samples, encode):
    """Layer 2 adds a linear map of what the projection before it wrote: without it, the fitted model is the same."""
    data, change = make_samples([13] * 9, image=False), rows(32, 32, seed=4) / 32
    lvlm = replace(llama, model=copy.deepcopy(llama.model))
    written = []
    lvlm.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, out: written.append(out))
    lvlm.layers[2].register_forward_hook(lambda _, args, out: args[0] + written[-1] @ change)
    inputs = encode(lvlm, data.samples)
    with torch.inference_mode():
        dense = lvlm.model(**inputs).logits
        plan = Plan(4, (2,))
        hidden = Activations(lvlm, data, select(calibrate(lvlm, data, statistics=()), All()))
        patch = Linear(ridge=0, shrink=shrink).fit(hidden, plan)
        pruned = [apply(lvlm, plan, p).model(**inputs).logits for p in (patch, Patch())]
    scale = float(dense.abs().max())
    torch.testing.assert_close(pruned[0], dense, atol=1e-4 * scale, rtol=0)
    assert (pruned[1] - dense).abs().max() > 1e-2 * scale


def test_least_squares_of_no_gap_is_the_identity():
    written = rows(50)
    for ridge in (0, 0.1):
        left = Linear(ridge=ridge).fit(Stream(written, 0 * written), PLAN).updates[0, "mlp"].left
        assert left.abs().max() < 1e-6
    assert not Linear().fit(Stream(written, 0 * written), Plan(3, ()))
    far = Linear(ridge=1e9, shrink="zero").fit(Stream(written, 0 * written), PLAN).updates[0, "mlp"].left
    torch.testing.assert_close(far, -torch.eye(16), atol=1e-3, rtol=0)  # a large ridge pulls T to zero


def test_the_ridge_means_the_same_at_any_scale_and_number_of_rows():
    written, gap = rows(60), rows(60, seed=1)
    fit = Linear(ridge=0.3).fit(Stream(written, gap), PLAN).updates[0, "mlp"].left
    double = Linear(ridge=0.3).fit(Stream(written.repeat(2, 1), gap.repeat(2, 1)), PLAN).updates[0, "mlp"].left
    scaled = Linear(ridge=0.3).fit(Stream(100 * written, 100 * gap), PLAN).updates[0, "mlp"].left
    torch.testing.assert_close(fit, double)
    torch.testing.assert_close(fit, scaled)


def test_least_squares_weighs_tokens():
    written, gap, weights = rows(80), rows(80, seed=1), torch.zeros(80)
    weights[:40] = 1
    half = Linear(ridge=0).fit(Stream(written[:40], gap[:40]), PLAN).updates[0, "mlp"].left
    picked = Linear(ridge=0, rows="selected").fit(Stream(written, gap, weights), PLAN).updates[0, "mlp"].left
    every = Linear(ridge=0, rows="all").fit(Stream(written, gap, weights), PLAN).updates[0, "mlp"].left
    torch.testing.assert_close(half, picked)
    assert (every - picked).abs().max() > 0.01


def test_too_few_tokens_need_a_ridge():
    written = rows(8)
    with pytest.raises(SvlError, match=r"set compensation\.ridge above 0"):
        Linear(ridge=0).fit(Stream(written, written), PLAN)
    assert Linear(ridge=1e-3).fit(Stream(written, written), PLAN)
    with pytest.raises(SvlError, match="leaves no token"):
        Linear(rows="selected").fit(Stream(written, written, torch.zeros(8)), PLAN)
    with pytest.raises(SvlError, match="not finite"):
        Linear().fit(Stream(written, written * float("inf")), PLAN)


def test_the_cosine_fit_turns_towards_the_gap():
    written, change = rows(400), rows(16, seed=1) / 4
    stream = Stream(written, written @ change)
    for accurate in (False, True):
        left = LinearCosine(lr=1e-2, epochs=60, batch=100, accurate=accurate).fit(stream, PLAN).updates[0, "mlp"].left
        moved = written + written @ left.T
        target = written + written @ change
        if accurate:
            moved, target = moved + stream.before - written, stream.h(2)
        assert 1 - F.cosine_similarity(moved, target, dim=-1).mean() < 0.02
    assert LinearCosine(epochs=0).fit(stream, PLAN).updates[0, "mlp"].left.abs().max() == 0


def test_the_mean_update_goes_into_a_bias_where_there_is_one():
    written, gap = rows(50), rows(50, seed=1) + 3
    update = MeanUpdate().fit(Stream(written, gap, bias=True), PLAN).updates[0, "mlp"]
    torch.testing.assert_close(update.shift, gap.mean(0))
    assert update.left is None

    constant = written.clone()
    constant[:, 0] = 2.0  # a coordinate that is always the same carries a constant exactly
    patch = MeanUpdate(ridge=0).fit(Stream(constant, gap), PLAN)
    update = patch.updates[0, "mlp"]
    torch.testing.assert_close(
        (constant @ update.right.T) @ update.left.T, gap.mean(0).expand(50, -1), atol=1e-4, rtol=0
    )
    assert "0% of it missed" in patch.notes[0]


@pytest.mark.parametrize("compensation", [Linear(ridge=1e-3), LinearCosine(lr=1e-3), MeanUpdate()])
def test_maps_bring_the_pruned_model_closer(lm, make_samples, compensation):
    data = make_samples([9, 12, 14, 10, 11, 13, 8, 12])
    stats = select(calibrate(lm, data), All())
    hidden, plan = Activations(lm, data, stats), Plan(4, (2,))
    patch = compensation.fit(hidden, plan)
    assert list(patch.updates) == [(1, "mlp")]

    def distance(patch):
        total = 0.0
        for a, b in zip(hidden.stream([3]), hidden.stream([3], plan=plan, patch=patch), strict=True):
            total += float(1 - F.cosine_similarity(a.h(3), b.h(3), dim=-1).mean())
        return total

    assert distance(patch) < distance(Patch())
    first = compensation.fit(hidden, Plan(4, (0,)))
    assert not first
    assert "layer 0" in first.notes[0]
