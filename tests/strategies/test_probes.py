"""Strategies that ask for losses of removals, against searches over rebuilt models and counts of their papers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.references import rebuilt_loss, rebuilt_losses
from torch.nn import functional as F

from svl.calibration.calibrate import calibrate
from svl.calibration.removal_probe import ModelProbe
from svl.core import Plan, Stats, SvlError
from svl.models.sample_inputs import encode_answer
from svl.pruning.surgery import apply
from svl.strategies.depth_shapley import DepthShapley
from svl.strategies.shortened_magnitude import ShortenedMagnitude
from svl.strategies.shortened_ppl import ShortenedPpl
from svl.strategies.shortened_taylor import ShortenedTaylor
from svl.strategies.sleb import Sleb


class Counting:
    """A probe whose loss is the sum of what its removed layers cost."""

    def __init__(self, costs):
        self.costs, self.asked = costs, 0

    def with_samples(self, n):
        return self

    def losses(self, removed, candidates):
        base = sum(self.costs[i] for i in removed)
        self.asked += len(candidates)
        return base, {i: base + self.costs[i] for i in candidates}


@pytest.mark.parametrize(("n", "evaluations"), [(7, 189), (10, 255)])
def test_sleb_evaluates_as_often_as_its_paper(n, evaluations):
    costs = torch.randperm(32, generator=torch.Generator().manual_seed(n)).tolist()
    probe = Counting(costs)
    plan = Sleb().plan(Stats(32, tuple(range(32)), probe=probe), n)
    assert probe.asked == evaluations
    assert plan.removed == tuple(sorted(sorted(range(1, 31), key=costs.__getitem__)[:n]))


def test_layers_that_sleb_never_tries_count_as_the_most_important_one_tried():
    stats = Stats(6, (0, 1, 2, 4, 5), probe=Counting([0.0, 4.0, 1.0, 0.0, 3.0, 0.0]))
    assert Sleb().plan(stats, 2).importance == (4.0, 4.0, 1.0, 4.0, 3.0, 4.0)
    assert Sleb().plan(stats, 0).importance == (0.0,) * 6


@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
def test_a_loss_that_is_no_number_is_not_taken_for_a_layer_that_was_never_tried(loss):
    stats = Stats(5, tuple(range(5)), probe=Counting([0.0, 2.0, 1.0, loss, 0.0]))
    with pytest.raises(SvlError, match=r"importance of a layer is (inf|nan)"):
        Sleb().plan(stats, 1)


def test_sleb_decides_like_a_search_over_rebuilt_models(lm, samples):
    plan = Sleb().plan(replace(calibrate(lm, samples), probe=ModelProbe(lm, samples)), 2)
    removed = []
    for _ in range(2):
        alive = [i for i in range(4) if i not in removed]
        removed.append(min(alive[1:-1], key=lambda i: rebuilt_loss(lm, samples, (*removed, i))))
    assert plan.removed == tuple(sorted(removed))
    with pytest.raises(SvlError, match="after 2 of 3"):
        Sleb().plan(replace(calibrate(lm, samples), probe=ModelProbe(lm, samples)), 3)


def test_leaving_one_out(lm, samples):
    stats = replace(calibrate(lm, samples), probe=ModelProbe(lm, samples))
    base, *without = rebuilt_losses(lm, samples, [(), (0,), (1,), (2,), (3,)])
    effect = [loss - base for loss in without]
    assert DepthShapley().plan(stats, 2).importance == pytest.approx(effect, abs=1e-5)
    assert ShortenedPpl(protected=(0, -1)).plan(stats, 1).removed == (min((1, 2), key=effect.__getitem__),)

    distance, n = 0.0, 0
    without = apply(lm, Plan(4, (2,)))
    for example in samples.samples:
        inputs, answer = encode_answer(lm, example)
        with torch.inference_mode():
            change = lm.model(**inputs).logits[0] - without.model(**inputs).logits[0]
        where = answer.roll(-1)
        where[-1] = False
        distance, n = distance + float(change[where].norm(dim=-1).sum()), n + int(where.sum())
    assert DepthShapley("logits").plan(stats, 2).importance[2] == pytest.approx(distance / n, rel=1e-4)


def test_taylor_is_the_steepest_change_of_the_loss(llama, samples):
    """The loss changes by sum |W dL/dW| per unit of W + s |W| sign(dL/dW), which a finite difference sees."""
    salience = ModelProbe(llama, samples).taylor()
    for i in range(4):
        layer = llama.layers[i]
        weights = [p for n, p in layer.named_parameters() if not n.endswith("bias")]
        kept = [w.detach().clone() for w in weights]
        for w in weights:
            w.requires_grad_(True)
        total, n = 0.0, 0
        for example in samples.samples:
            inputs, answer = encode_answer(llama, example)
            where = answer.nonzero()[:, 0]
            logits = llama.model(**inputs).logits[0]
            total = total + F.cross_entropy(logits[where - 1], inputs["input_ids"][0][where], reduction="sum")
            n += len(where)
        gradients = torch.autograd.grad(total / n, weights)
        signs = [w.detach().abs() * g.sign() for w, g in zip(weights, gradients, strict=True)]
        change = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                for w, old, sign in zip(weights, kept, signs, strict=True):
                    w.copy_(old + step * sign)
            change.append(rebuilt_loss(llama, samples, ()))
        with torch.no_grad():
            for w, old in zip(weights, kept, strict=True):
                w.copy_(old)
                w.requires_grad_(False)
        assert (change[0] - change[1]) / 2e-4 == pytest.approx(salience[i], rel=2e-2)
    plan = ShortenedTaylor(protected=(0,)).plan(replace(calibrate(llama, samples), probe=ModelProbe(llama, samples)), 1)
    assert plan.removed == (min((1, 2, 3), key=salience.__getitem__),)


def test_magnitudes_are_sums_over_a_layers_weights(qwen):
    sums = [0.0] * 4
    for name, tensor in qwen.model.state_dict().items():
        if name.startswith(qwen.anatomy.layers) and name.endswith("weight"):
            sums[int(name[len(qwen.anatomy.layers) + 1])] += float(tensor.double().abs().sum())
    probe = ModelProbe(qwen, None)
    assert probe.magnitude(1) == pytest.approx(sums, rel=1e-6)
    plan = ShortenedMagnitude(protected=(0, -1)).plan(Stats(4, (0, 1, 2, 3), probe=probe), 1)
    assert plan.removed == (min((1, 2), key=sums.__getitem__),)
    assert probe.magnitude(2) != probe.magnitude(1)


def test_protected_layers_count_from_both_ends():
    stats = Stats(8, tuple(range(8)), probe=Counting([5, 4, 3, 2, 1, 0, 0, 0]))
    assert ShortenedPpl(protected=(0, 1, -2, -1)).plan(stats, 2).removed == (4, 5)
    with pytest.raises(SvlError, match="at most 2 may go"):
        ShortenedPpl().plan(stats, 3)
