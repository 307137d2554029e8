"""Refit against a dense solve, and the regression below it."""

from __future__ import annotations

import pytest
import torch

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.refit import Refit
from svl.compensation.regression import Regression
from svl.core import Patch, Plan, SvlError
from svl.models.loading import load
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All


def rows(n, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def down_proj(lvlm, layer):
    """The weight that a layer's MLP writes with."""
    return lvlm.layers[layer].get_submodule(lvlm.anatomy.writers["mlp"][layer].module).weight


def test_refit_is_the_regression_it_says(lm, samples):
    """Against a dense solve over all tokens at once, for the layer before the gap."""
    plan = Plan(4, (1, 2))
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    patch = Refit(ridges=(0.5,), targets=("mlp",)).fit(hidden, plan)
    assert list(patch.updates) == [(0, "mlp"), (3, "mlp")]
    x, gap, scale = [], [], []
    for sample in hidden.stream([1, 3], [(0, "mlp")]):
        x.append(sample.read(0, "mlp").double())
        gap.append((sample.h(3) - sample.h(1)).double())
        scale.append(sample.h(3).double().square().sum(-1))
    x, gap, root = torch.cat(x), torch.cat(gap), torch.cat(scale).rsqrt()[:, None]
    ridge = 0.5 * (root * x).square().sum(0).mean()
    stacked = torch.cat([root * x, ridge.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([root * gap, torch.zeros(x.shape[1], gap.shape[1], dtype=x.dtype)])
    exact = torch.linalg.lstsq(stacked, target).solution.mT
    change = patch.updates[0, "mlp"].weight.double() - down_proj(lm, 0).double()
    torch.testing.assert_close(change, exact, atol=1e-4, rtol=1e-3)


def test_refit_brings_the_pruned_model_closer_than_one_map_does(lm, make_samples):
    data = make_samples([9, 12, 14, 10, 11, 13, 8, 12, 9, 10])
    hidden, plan = Activations(lm, data, select(calibrate(lm, data), All())), Plan(4, (1,))

    def distance(patch):
        pairs = zip(hidden.stream([4]), hidden.stream([4], plan=plan, patch=patch), strict=True)
        return sum(float(((a.h(4) - b.h(4)).norm(dim=-1) / a.h(4).norm(dim=-1)).mean()) for a, b in pairs)

    errors = [distance(p) for p in (Refit().fit(hidden, plan), Refit(layers="gaps").fit(hidden, plan), Patch())]
    assert errors == sorted(errors)
    assert Refit(layers="gaps").fit(hidden, plan).updates.keys() == {(0, "mlp"), (0, "attn")}
    assert not Refit().fit(hidden, Plan(4, ()))
    for wrong in (
        {"ridges": ()},
        {"ridges": (0.0,)},
        {"fold": 1},
        {"layers": "some"},
        {"rows": "none"},
        {"targets": ("qkv",)},
    ):
        with pytest.raises(SvlError, match=f"compensation.{next(iter(wrong))}"):
            Refit(**wrong)


def test_a_refit_is_kept_in_the_model_s_own_precision(checkpoint, samples):
    """Half as large as the change in fp32, and still what the walk went on with, so that the gap is the one it says."""
    lvlm = load(checkpoint("llava"), dtype="bfloat16")
    hidden = Activations(lvlm, samples, select(calibrate(lvlm, samples), All()))
    plan = Plan(4, (1,))
    patch = Refit(ridges=(0.5,)).fit(hidden, plan)
    pruned = apply(lvlm, plan, patch)
    for layer, role in patch.updates:
        weight = patch.updates[layer, role].weight
        module = lvlm.anatomy.writers[role][layer].module
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, pruned.layers[plan.kept.index(layer)].get_submodule(module).weight)
        assert not torch.equal(weight, lvlm.layers[layer].get_submodule(module).weight)


def test_a_regression_adds_up():
    x, y, w = rows(30, 4), rows(30, 3, seed=1), torch.rand(30, generator=torch.Generator().manual_seed(2))
    whole, first, second = Regression(), Regression(), Regression()
    whole.add(x, y, w)
    first.add(x[:10], y[:10], w[:10])
    second.add(x[10:], y[10:], w[10:])
    first.take_rows_of(second)
    torch.testing.assert_close(whole.solve(0.1), first.solve(0.1))
    solution = whole.solve(0)
    left = (w[:, None] * (y - x @ solution.float()) ** 2).sum() / (w[:, None] * y**2).sum()
    assert whole.left_over(solution) == pytest.approx(float(left), abs=1e-5)
    assert whole.left_over(0 * solution) == 1
