"""What strategies that merge layers measure and try: protected layers, other kinds of layers, numbers out of reach."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.families import lvlm_of
from torch.nn import functional as F

import svl
from svl.calibration.removal_probe import ModelProbe
from svl.compensation.merge import Merge
from svl.core import Patch, Plan, Stats, SvlError
from svl.core.merging import merge_coefficients
from svl.models.sample_inputs import encode_answer
from svl.pruning.folding import check_patch_for_model, merge_kinds
from svl.pruning.surgery import apply
from svl.strategies.laco import Laco
from svl.strategies.merging import merge_plan
from svl.strategies.swm import Swm

LOW = ((0, (2,)),)  # a merge into the first layer


class Counting:
    """A probe of one similarity for all merges, which counts its passes."""

    def __init__(self, similarity: float = 1.0):
        self.value, self.asked = similarity, []

    def with_samples(self, n):
        return self

    def similarity(self, plan, patch):
        self.asked.append(plan.merges)
        return self.value


def whole_similarity(lvlm, samples, merges) -> float:
    """Mean cosine of what leaves the final norm of the dense and of the merged model, each run as a whole."""
    merged = apply(lvlm, *merged_by(lvlm, merges))
    total = 0.0
    for sample in samples:
        inputs, _ = encode_answer(lvlm, sample)
        with torch.inference_mode():
            ends = [m.model(**inputs, output_hidden_states=True).hidden_states[-1].flatten() for m in (lvlm, merged)]
        total += float(F.cosine_similarity(*ends, dim=0))
    return total / len(samples)


def merged_by(lvlm, merges):
    return merge_plan(lvlm.anatomy.n_layers, merges), Patch(blends=merge_coefficients(merges, "paper"))


@pytest.mark.parametrize("strategy", [Laco, Swm])
def test_merges_are_done_by_the_formula_that_they_were_chosen_with(strategy):
    for chosen, other in (("paper", "released"), ("released", "paper")):
        plan = strategy(chosen, threshold=0.5).plan(Stats(6, (2, 3, 4), probe=Counting()), 0)
        plan = Plan.from_json(plan.to_json())
        assert plan.merges
        Merge(chosen).check_plan(plan)
        with pytest.raises(SvlError, match=f"formula is {other}, but the plan's merges .* strategy.merge={chosen}"):
            Merge(other).check_plan(plan)
    told = Plan(6, (2,), merges=((1, (2,)),))  # of an older run, or written by hand
    assert Merge("paper").fit(None, told).blends
    assert Merge("released").fit(None, told).blends


@pytest.mark.parametrize("protect", ["auto", [0], [0, 1]])
@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_similarity_counts_a_merge_into_a_protected_layer(checkpoint, samples, kind, protect):
    lvlm = svl.load(checkpoint(kind), device="cpu", protect=protect)
    probe = ModelProbe(lvlm, samples)
    for merges in (((2, (3,)),), ((1, (2, 3)),), ((0, (1,)),), ((0, (1, 2)),)):
        if not {i for _, gone in merges for i in gone} & set(lvlm.anatomy.protected):
            found = probe.similarity(*merged_by(lvlm, merges))
            assert found == pytest.approx(whole_similarity(lvlm, samples, merges), abs=1e-5)


def test_nothing_is_merged_into_a_layer_that_visual_features_enter_behind(mimic, make_samples, caplog):
    """Qwen3-VL: behind layers 0..2; what a merge into layer 2 would do is not told by running layers one by one."""
    lvlm = svl.load(mimic("qwen3_vl_8b"), device="cpu", dtype="float32")
    samples, n = make_samples([3, 5]), lvlm.anatomy.n_layers
    assert lvlm.anatomy.removable == tuple(range(3, n))
    kinds = merge_kinds(lvlm.anatomy, lvlm.layers)
    assert kinds[:3] == (None,) * 3
    assert set(kinds[3:]) == {0}
    probe = ModelProbe(lvlm, samples)
    with pytest.raises(SvlError, match=r"another layer 2 cannot be told .* enter behind layers 0\.\.2"):
        probe.similarity(*merged_by(lvlm, ((2, (3,)),)))
    for strategy in (Laco(threshold=-1.0, size=2), Swm(threshold=-1.0)):
        counting = Counting()
        with caplog.at_level(logging.INFO):
            plan = strategy.plan(Stats(n, lvlm.anatomy.removable, probe=counting, kinds=kinds), 0)
        assert plan.merges
        assert all(into >= 3 for asked in counting.asked for into, _ in asked)
        assert "nothing is merged into layers [0, 1, 2]" in caplog.text
        caplog.clear()
        last = plan.merges[:1]
        assert probe.similarity(*merged_by(lvlm, last)) == pytest.approx(
            whole_similarity(lvlm, samples, last), abs=1e-5
        )


@pytest.mark.parametrize("family", ["lfm2_vl", "qwen3_5", "mllama", "llama4", "qwen3_vl_moe", "gemma4"])
def test_only_layers_of_one_kind_are_merged(family):
    """Dense and MoE layers, kinds of attention: what the walks try can be applied, what they do not is refused."""
    lvlm, _ = lvlm_of(family)
    anatomy, kinds = lvlm.anatomy, merge_kinds(lvlm.anatomy, lvlm.layers)
    stats = Stats(anatomy.n_layers, anatomy.removable, kinds=kinds)
    refused = 0
    for gone in anatomy.removable:
        if gone <= anatomy.entered:  # nothing is before it, or visual features enter there
            continue
        plan, patch = merged_by(lvlm, ((gone - 1, (gone,)),))
        if stats.can_merge(gone - 1, (gone,)):
            check_patch_for_model(patch, plan, anatomy, lvlm.layers)
            apply(lvlm, plan, patch)
        else:
            refused += 1
            with pytest.raises(SvlError, match=r"cannot be merged: projections of layer \d+ differ"):
                check_patch_for_model(patch, plan, anatomy, lvlm.layers)
    assert refused
    for strategy in (Laco(threshold=-1.0, size=2), Swm(threshold=-1.0), Laco(threshold=-1.0, size=3)):
        probe = Counting()
        strategy.plan(Stats(anatomy.n_layers, anatomy.removable, probe=probe, kinds=kinds), 0)
        for merges in probe.asked:
            plan, patch = merged_by(lvlm, merges)
            check_patch_for_model(patch, plan, anatomy, lvlm.layers)


@pytest.mark.parametrize(
    ("strategy", "n_remove", "reached"),
    [(Swm(highest=5), 6, 5), (Laco(size=3, interval=4), 12, 8), (Laco(lowest=8), 10, 7)],
    ids=["swm", "interval", "lowest"],
)
def test_a_number_that_the_walk_cannot_reach_is_refused_before_any_pass(strategy, n_remove, reached):
    stats = Stats(16, tuple(range(16)))
    with pytest.raises(SvlError, match=f"merging reaches {reached} removed layers only, not {n_remove}"):
        strategy.check(stats, n_remove)
    strategy.check(stats, reached)
    probe = Counting()
    assert len(strategy.plan(Stats(16, tuple(range(16)), probe=probe), reached).removed) == reached
    with pytest.raises(SvlError, match="merging reaches 0 removed layers only, not 1"):
        strategy.check(Stats(16, tuple(range(16)), kinds=tuple(range(16))), 1)


def test_values_that_are_kept_hold_for_any_protected_layers(checkpoint, samples):
    """One memory for models that differ in `protect` alone, as the store is: whoever asks first, values are equal."""

    def asked(protect, memory):
        def remember(what, inputs, compute):
            key = str((what, inputs))
            return memory[key] if key in memory else memory.setdefault(key, compute())

        probe = ModelProbe(svl.load(checkpoint("llama"), device="cpu", protect=protect), samples, remember=remember)
        merged = probe.similarity(*merged_by(probe.lvlm, ((1, (2,)),))), probe.similarity(*merged_by(probe.lvlm, LOW))
        return *merged, *probe.losses((), (2, 3))[1].values(), *probe.changes((), (2,)).values(), *probe.taylor()

    alone = {protect: asked(protect, {}) for protect in ("auto", (0,), (0, 1))}
    for first in alone:
        memory = {}
        for protect in (first, *alone):
            assert asked(protect, memory) == pytest.approx(alone[protect], abs=1e-6), (first, protect)
