"""Every strategy with every selector, every kind of plan with every compensation, all with every kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.methods import CHOICES, GROUPS, distinct, method
from helpers.pairwise import pairwise
from helpers.references import close, compensated, logits

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.calibration.removal_probe import ModelProbe
from svl.calibration.rescoring import ModelRescoring
from svl.core import Plan
from svl.pruning.surgery import apply

MODELS = ("llava", "qwen", "internvl", "llama")
# No picture to select the tokens of.
IMPOSSIBLE = {("llama", "visual")}
# A compensation sees the plan alone. Single layers, a block, merges, an order, sub-layers, and a plan by hand.
PLANS = ("short_lvlm", "angular", "laco", "iterative", "sublayer_cosine", "layer_pairs", "manual")
ARRAYS = (
    {
        "strategy": distinct("strategy"),
        "selector": CHOICES["selector"],
        "compensation": ("linear", "none"),
        "model": MODELS,
    },
    {"strategy": PLANS, "selector": CHOICES["selector"], "compensation": CHOICES["compensation"], "model": MODELS},
)
ROWS = {tuple(row.items()): row for axes in ARRAYS for row in pairwise(axes)}
COMBINATIONS = [row for row in ROWS.values() if (row["model"], row["selector"]) not in IMPOSSIBLE]


@pytest.fixture(scope="module")
def calibrated(request, make_samples):
    """A model, its samples, their statistics (with sub-layers if asked for) and their probe, by the model's name."""
    kept = {}

    def of(name: str, sublayers: bool):
        if (name, sublayers) not in kept:
            lvlm = request.getfixturevalue(name)
            samples = make_samples([13] * 6, image=False) if name == "llama" else make_samples([3, 9, 5, 7])
            more = {"statistics": ("cosine", "windows", "sublayers", "attention")} if sublayers else {}
            measured = calibrate(lvlm, samples, **more)
            kept[name, sublayers] = (lvlm, samples, measured, ModelProbe(lvlm, samples))
        return kept[name, sublayers]

    return of


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda row: "-".join(row.values()))
def test_the_pruned_model_is_the_dense_one_that_skips_layers_and_adds_the_patch(chosen, calibrated, encode):
    """Folding equals doing on the way what the patch says: see helpers.references.compensated."""
    strategy, selector, compensation = (method(group, chosen[group]) for group in GROUPS)
    lvlm, samples, measured, probe = calibrated(chosen["model"], "sublayers" in strategy.needs)
    stats = replace(select(measured, selector), probe=probe)
    hidden = Activations(lvlm, samples, stats)
    plan = strategy.plan(replace(stats, rescoring=ModelRescoring(hidden, compensation)), 2)
    joint = chosen["strategy"] in ("sublayer_cosine", "block_pruner")  # attention and MLP of one layer are the layer
    wanted = {"identity": 0, "block_pruner": 4}.get(chosen["strategy"], 2)
    assert len(plan.removed) * (1 + joint) + len(plan.sublayers) == wanted
    assert set(plan.removed) <= set(lvlm.anatomy.removable)
    assert Plan.from_json(plan.to_json()) == plan
    patch = compensation.fit(hidden, plan)
    pruned = apply(lvlm, plan, patch)
    assert len(pruned.layers) == len(plan.kept)
    inputs = encode(lvlm, samples.samples[:2])
    with compensated(lvlm, plan, patch) as reference:
        close(logits(pruned.model, inputs), logits(reference, inputs))
