"""Compensations of plans that also take attentions or MLPs of kept layers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.methods import distinct, method
from helpers.references import logits

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.checkpoints.pruning_record import changed_writers
from svl.compensation.linear import Linear
from svl.compensation.refit import Refit
from svl.core import Compensation, Patch, Plan, SvlError, Update, fitted_patch
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All

MERGING = ("merge", "come")  # puts a removed layer into the one before it
# `linear_replaceme` is `linear` without ridge, for which these samples have too few tokens.
COMPENSATIONS = [name for name in distinct("compensation") if name not in ("none", "linear_replaceme")]


def hidden_of(lvlm, samples):
    return Activations(lvlm, samples, select(calibrate(lvlm, samples), All()))


def silenced(lvlm, sublayers):
    """A copy of the dense model whose sub-layers of these names have output weights of 0."""
    model = copy.deepcopy(lvlm.model)
    changed = replace(lvlm, model=model)
    with torch.no_grad():
        for layer, role in sublayers:
            writer = changed.layers[layer].get_submodule(lvlm.anatomy.writers[role][layer].module)
            for parameter in writer.parameters():
                parameter.zero_()
    return changed


def parts_of(patch):
    """All tensors and numbers of a patch, by where they are."""
    found = {}
    for key, update in patch.updates.items():
        for name in ("left", "right", "delta", "shift", "weight", "scale"):
            if (value := getattr(update, name)) is not None:
                found[(*key, name)] = torch.as_tensor(value)
    found |= {("map", start): value for start, value in patch.maps.items()}
    for layer, joined in patch.joins.items():
        found |= {("join", layer, part.layer, "share"): torch.tensor(part.share) for part in joined}
        found |= {("join", layer, part.layer, "channels"): part.channels for part in joined}
    return found


@pytest.mark.parametrize("name", [name for name in COMPENSATIONS if "refit" not in name])
def test_gaps_are_those_of_the_model_without_the_sublayers(name, llava, samples):
    """Fitted as to a model whose sub-layers' weights are 0; but for `refit`, which aims at the dense states."""
    compensation, sublayers = method("compensation", name), ((0, "attn"), (1, "mlp"))
    plan = Plan(4, (3,), removed_attn=(0,), removed_mlp=(1,))
    patch = compensation.fit(hidden_of(llava, samples), plan)
    expected = parts_of(compensation.fit(hidden_of(silenced(llava, sublayers), samples), Plan(4, (3,))))
    assert expected.keys() == parts_of(patch).keys()
    for key, value in parts_of(patch).items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", COMPENSATIONS)
@pytest.mark.parametrize("role", ["attn", "mlp"])
def test_a_gap_behind_a_layer_that_lost_a_part_is_filled_or_refused(name, role, llava, samples, encode):
    """What is told as changed is there, and has an effect."""
    compensation, plan = method("compensation", name), Plan(4, (1,), **{f"removed_{role}": (0,)})
    if name in MERGING:
        with pytest.raises(SvlError, match=f"compensation={name} puts removed layers into layer 0, but the plan takes"):
            compensation.fit(None, plan)
        return
    patch = fitted_patch(compensation, hidden_of(llava, samples), plan)
    assert changed_writers(patch)
    assert f"0.{role}" not in changed_writers(patch)
    inputs = encode(llava, samples.samples[:2])
    with_it, without = (logits(apply(llava, plan, found).model, inputs) for found in (patch, None))
    assert (with_it - without).abs().max() > 1e-3 * without.abs().max()


def test_the_attention_fills_a_gap_where_the_mlp_is_gone(lm, samples):
    """Against a dense solve over what the attention writes in a model whose MLP writes 0."""
    patch = Linear(ridge=0.1).fit(hidden_of(lm, samples), Plan(4, (1, 2), removed_mlp=(0,)))
    assert list(patch.updates) == [(0, "attn")]
    assert patch.notes == ("layer 0 has no MLP any more: its attention fills the gap",)
    bare = hidden_of(silenced(lm, [(0, "mlp")]), samples)
    states = [(s.wrote(0, "attn").double(), (s.h(3) - s.h(1)).double()) for s in bare.stream([1, 3], [(0, "attn")])]
    written, gap = (torch.cat(part) for part in zip(*states, strict=True))
    gram = written.mT @ written
    exact = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), written.mT @ gap)
    torch.testing.assert_close(patch.updates[0, "attn"].left.double(), exact.mT, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "plan", [Plan(4, (1,), removed_attn=(2,)), Plan(4, (2,), removed_mlp=(0,)), Plan(4, (0,))], ids=str
)
def test_refit_is_fitted_to_the_model_that_it_is_for(plan, lm, samples):
    """Every update against a dense solve over states of the pruned model with the updates before it."""
    hidden = hidden_of(lm, samples)
    patch = Refit(ridges=(0.5,), targets=("mlp",)).fit(hidden, plan)
    kept, before = [*plan.kept, 4], {}
    assert patch.updates.keys() == {(i, "mlp") for i in plan.kept if i >= plan.removed[0] - 1}
    for (layer, role), update in patch.updates.items():
        point = kept[kept.index(layer) + 1]
        x, gap, weight = [], [], []
        pruned = hidden.stream([point], [(layer, role)], plan, Patch(dict(before)))
        for here, dense in zip(pruned, hidden.stream([point]), strict=True):
            x.append(here.read(layer, role).double())
            gap.append((dense.h(point) - here.h(point)).double())
            weight.append(dense.h(point).double().square().sum(-1).reciprocal())
        x, gap, weight = torch.cat(x), torch.cat(gap), torch.cat(weight)[:, None]
        gram = x.mT @ (weight * x)
        exact = torch.linalg.solve(gram + 0.5 * gram.diagonal().mean() * torch.eye(len(gram)), x.mT @ (weight * gap))
        assert exact.abs().max() > 1e-3
        old = lm.layers[layer].get_submodule(lm.anatomy.writers[role][layer].module).weight
        torch.testing.assert_close((update.weight - old).double(), exact.mT, atol=2e-4, rtol=1e-2)
        before[layer, role] = update


def test_a_change_of_what_is_gone_is_refused(lm, samples):
    class Careless(Compensation):
        def fit(self, hidden, plan):
            return Patch({(0, "mlp"): Update(scale=2.0)})

    plan = Plan(4, (1,), removed_mlp=(0,))
    with pytest.raises(SvlError, match="Careless changes 'mlp' of layer 0, which the plan takes from that layer"):
        fitted_patch(Careless(), None, plan)
    with pytest.raises(SvlError, match="the patch changes 'mlp' of layer 0, which the plan takes from that layer"):
        apply(lm, plan, Patch({(0, "mlp"): Update(scale=2.0)}))
    with pytest.raises(SvlError, match="nothing can be fitted to 'mlp' of layer 0, which the plan takes"):
        list(hidden_of(lm, samples).stream([1], [(0, "mlp")], plan))
