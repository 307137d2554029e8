"""Sliding-window merging against its loop written out, and on models."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from svl.calibration.calibrate import calibrate
from svl.calibration.removal_probe import ModelProbe
from svl.compensation.merge import Merge
from svl.core import Patch, Plan, Stats, SvlError
from svl.core.merging import merge_coefficients
from svl.strategies.swm import Swm


class Similar:
    """A probe whose similarity is a fixed random number for every sequence of merges, and which counts its passes."""

    def __init__(self):
        self.asked = []

    def with_samples(self, n):
        return self

    def similarity(self, plan, patch):
        self.asked.append(plan.merges)
        return random.Random(str(plan.merges)).uniform(0.2, 1)


def stats_of(depth: int, **fields) -> Stats:
    return replace(Stats(depth, tuple(range(depth)), probe=Similar()), **fields)


@pytest.mark.parametrize("merge", ["paper", "released"])
@pytest.mark.parametrize("seed", range(40))
def test_windows_grow_as_the_loop_says(seed, merge):
    """The loop, written out: a window is merged and tried, and merged for good when one layer more is too many."""
    chance = random.Random(seed)
    depth, threshold = chance.randint(4, 18), chance.uniform(0.2, 0.9)
    merges, high = (), depth - 2
    low = high - 1
    while low >= 0:
        tried = (*merges, (low, tuple(range(low + 1, high + 1))))
        plan = Plan(depth, tuple(i for _, gone in tried for i in gone), merges=tried)
        if Similar().similarity(plan, Patch()) > threshold:
            low -= 1
            if low >= 0 or merge == "released":
                continue
        if low + 1 < high:
            merges = (*merges, (low + 1, tuple(range(low + 2, high + 1))))
        high = low
        low = high - 1
    plan = Swm(merge, threshold).plan(stats_of(depth), 3)
    assert plan.merges == merges  # whatever the ratio
    assert plan.removed == tuple(sorted(i for _, gone in merges for i in gone))
    assert plan.provenance == {"threshold": threshold, "formula": merge}


def test_the_last_layer_and_protected_ones_are_not_merged_away():
    removable = tuple(i for i in range(12) if i not in (4, 5, 10))
    for threshold in (-1.0, 0.4, 0.6):
        plan = Swm(threshold=threshold).plan(stats_of(12, removable=removable), 0)
        assert not {4, 5, 10, 11} & set(plan.removed)
        assert all(low not in plan.removed for low, _ in plan.merges)
    assert Swm(threshold=-1.0).plan(stats_of(12), 0).merges == ((0, tuple(range(1, 11))),)
    assert Swm(threshold=-1.0, highest=11).plan(stats_of(12), 0).merges == ((0, tuple(range(1, 12))),)
    assert Swm("released", threshold=-1.0).plan(stats_of(12), 0).merges == ()  # as released: it has grown to layer 0
    assert Swm(threshold=1.0).plan(stats_of(12), 3).merges == ()


@pytest.mark.parametrize("n", range(1, 9))
def test_the_threshold_for_a_ratio_is_the_highest_that_reaches_it(n):
    """Here similarity falls with every layer that goes, so which thresholds reach how many is known."""

    class Falling(Similar):
        def similarity(self, plan, patch):
            self.asked.append(plan.merges)
            return 0.995 - 0.05 * len(plan.removed)

    stats = stats_of(12, probe=Falling())
    plan = Swm().plan(stats, n)
    assert plan.merges == ((10 - n, tuple(range(11 - n, 11))),)
    assert plan.provenance["threshold"] == pytest.approx(0.995 - 0.05 * n, abs=0.002)
    assert plan.provenance["threshold"] < 0.995 - 0.05 * n
    asked = stats.probe.asked
    assert len(asked) == len(set(asked))  # no pass is repeated


def test_numbers_that_cannot_be_reached_are_errors():
    with pytest.raises(SvlError, match="reaches 10 removed layers only, not 11"):
        Swm().plan(stats_of(12), 11)
    with pytest.raises(SvlError, match=r"strategy\.highest is 12, but the model has layers 0\.\.11"):
        Swm(highest=12).plan(stats_of(12), 1)
    with pytest.raises(SvlError, match=r"strategy\.merge is 'mean'"):
        Swm(merge="mean")


@pytest.mark.parametrize("formula", ["paper", "released"])
def test_models_are_merged_by_the_plan(formula, lm, samples):
    probe = ModelProbe(lm, samples)
    stats = replace(calibrate(lm, samples), probe=probe)
    plan = Swm(formula).plan(stats, 1)
    low, gone = plan.merges[0]
    assert (len(plan.removed), len(gone)) == (1, 1)
    assert 3 not in gone
    patch = Merge(formula).fit(None, plan)
    assert patch.blends == merge_coefficients(plan.merges, formula)
    assert patch.blends[low] == {gone[0]: 1.0}  # of two layers, both formulas keep the higher one's weights
    again = Swm(formula, threshold=plan.provenance["threshold"]).plan(stats, 0)
    assert plan.merges == again.merges[:1] or len(again.removed) > 1
    assert probe.similarity(plan, patch) > plan.provenance["threshold"]
