"""LaCo: the walk of its paper, and the weights that merging makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from svl.calibration.calibrate import calibrate
from svl.calibration.removal_probe import ModelProbe
from svl.compensation.merge import Merge
from svl.core import Patch, Plan, Stats, SvlError
from svl.core.merging import merge_coefficients
from svl.models.sample_inputs import encode_answer
from svl.pruning.surgery import apply
from svl.strategies.laco import Laco


def test_the_released_merge_keeps_the_last_layer_alone_and_the_papers_does_not():
    steps = ((5, (6, 7)), (4, (5,)))
    assert merge_coefficients(steps[:1], "released") == {5: {7: 1.0}}
    assert merge_coefficients(steps[:1], "paper") == {5: {5: -1.0, 6: 1.0, 7: 1.0}}
    assert merge_coefficients(steps, "released") == {4: {7: 1.0}}
    assert merge_coefficients(steps, "paper") == {4: {5: -1.0, 6: 1.0, 7: 1.0}}
    assert merge_coefficients(((3, (4,)), (2, (3, 5))), "paper") == {2: {2: -1.0, 4: 1.0, 5: 1.0}}


@pytest.mark.parametrize("formula", ["paper", "released"])
def test_merged_weights_are_what_the_formula_says(lm, formula):
    plan = Plan(4, (2, 3))
    pruned = apply(lm, plan, Merge(formula).fit(None, plan))
    old = [dict(layer.named_parameters()) for layer in lm.layers]
    for name, now in pruned.layers[1].named_parameters():
        if now.ndim < 2 and "norm" in name:
            expected = old[1][name]
        elif formula == "released":
            expected = old[3][name]
        else:
            expected = old[2][name] + old[3][name] - old[1][name]
        torch.testing.assert_close(now, expected, atol=1e-6, rtol=1e-5)
    for (_, a), (_, b) in zip(pruned.layers[0].named_parameters(), lm.layers[0].named_parameters(), strict=True):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("formula", ["paper", "released"])
def test_laco_walks_down_as_its_threshold_lets_it(lm, samples, formula):
    probe = ModelProbe(lm, samples)
    stats = replace(calibrate(lm, samples), probe=probe)
    all_gone = Laco(formula, threshold=-1.0, size=2).plan(stats, 0)
    assert all_gone.removed == (1, 2)  # however low the threshold, the first and the last stay
    assert Laco(formula, threshold=1.0).plan(stats, 2).removed == ()
    found = Laco(formula, size=2).plan(stats, 2)
    assert len(found.removed) == 2
    again = Laco(formula, size=2, threshold=found.provenance["threshold"]).plan(stats, 0)
    assert (again.merges, again.provenance) == (found.merges, found.provenance)
    assert Plan.from_json(found.to_json()).merges == found.merges
    merged = Patch(blends=merge_coefficients(found.merges, formula))
    assert Merge(formula).fit(None, found).blends == merged.blends

    pruned, total = apply(lm, found, merged), 0.0
    for example in samples.samples:
        inputs, _ = encode_answer(lm, example)
        ends = []
        for model in (lm, pruned):
            with torch.inference_mode():
                last = model.model(**inputs, output_hidden_states=True).hidden_states[-1]
            ends.append(last.flatten())
        total += float(F.cosine_similarity(*ends, dim=0))
    assert probe.similarity(found, merged) == pytest.approx(total / 5, abs=1e-5)


class Scripted:
    """A probe that answers with given similarities, by the merges, and notes what it was asked."""

    def __init__(self, similarities: dict[tuple, float], otherwise: float = 0.0):
        self.similarities, self.otherwise = similarities, otherwise
        self.asked: list[tuple] = []

    def with_samples(self, n):
        return self

    def similarity(self, plan, patch):
        self.asked.append(plan.merges)
        return self.similarities.get(plan.merges, self.otherwise)


def test_laco_by_hand():
    """Layers 0..8, C = 3, I = 2, H = 8, L = 1, threshold 0.5, as Algorithm 1 goes through them."""
    first = (5, (6, 7))  # at l = H - C = 5, layers 6 and 7 would go into 5: similar enough, so l becomes 3
    second = (3, (4, 5))  # of 0 1 2 3 4 5 8: not similar enough, so l becomes 2
    third = (2, (3, 4))  # similar enough, so l becomes 0, which is below L
    probe = Scripted({(first,): 0.9, (first, second): 0.4, (first, third): 0.6})
    stats = Stats(9, tuple(range(9)), probe=probe)
    plan = Laco(threshold=0.5, size=3, interval=2, lowest=1).plan(stats, 1)
    assert probe.asked == [(first,), (first, second), (first, third)]
    assert plan.merges == (first, third)
    assert plan.removed == (3, 4, 6, 7)  # whatever the ratio


def test_laco_searches_the_threshold_that_the_ratio_needs():
    """Of layers 0..3 with C = 2, layer 2 goes into 1, or layer 1 into 0: the first needs a threshold below 0.6."""
    probe = Scripted({((1, (2,)),): 0.6, ((0, (1,)),): 0.3})
    plan = Laco(size=2).plan(Stats(4, tuple(range(4)), probe=probe), 1)
    assert plan.merges == ((1, (2,)),)
    assert plan.provenance["threshold"] == pytest.approx(0.6, abs=0.002)  # the highest
    assert plan.provenance["threshold"] < 0.6


def test_laco_spares_protected_layers():
    probe = Scripted({}, otherwise=0.9)
    plan = Laco(threshold=0.5, size=2).plan(Stats(8, (1, 2, 5), probe=probe), 1)
    assert set(plan.removed) <= {1, 2, 5}
    assert all(set(gone) <= {1, 2, 5} for asked in probe.asked for _, gone in asked)


def test_laco_that_cannot_reach_the_ratio_says_so():
    stats = Stats(8, tuple(range(8)), probe=Scripted({}, otherwise=0.5))
    assert len(Laco(size=3).plan(stats, 7).removed) == 7
    with pytest.raises(SvlError, match="reaches 6 removed layers only, not 7"):
        Laco(size=2).plan(stats, 7)
    for wrong in ({"size": 8}, {"highest": 8}, {"lowest": 5}):
        with pytest.raises(SvlError, match=r"does not fit between strategy\.lowest"):
            Laco(**wrong).plan(stats, 1)
