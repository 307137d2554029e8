"""Refit against a dense solve, and the regression below it."""

from __future__ import annotations

import pytest
import torch

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.refit import Refit
from svl.compensation.regression import Halves, HeldOutRegression, Regression
from svl.core import Patch, Plan, SvlError
from svl.data.samples import Sample, Samples
from svl.models.loading import load
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All
from svl.selectors.visual import Visual


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
        {"texts": -1},
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


# -------------------------------------------------------------------------------------- with texts of the model's own

TEXTS = Samples(
    "", tuple(Sample(i, text, plain=True) for i, text in enumerate(["red round is", "what of the blue in"]))
)


def test_refit_weighs_given_samples_and_texts_equally(vlm, samples):
    """Against a dense solve over all tokens at once, each divided by how many its half has."""
    plan, stats = Plan(4, (1, 2)), select(calibrate(vlm, samples), All())
    patch = Refit(ridges=(0.5,), targets=("mlp",)).fit(Activations(vlm, samples, stats, generated=TEXTS), plan)
    x, gap, weight = [], [], []
    for half in (samples, TEXTS):
        states = list(Activations(vlm, half, select(calibrate(vlm, half), All())).stream([1, 3], [(0, "mlp")]))
        n = sum(len(sample.h(1)) for sample in states)
        for sample in states:
            x.append(sample.read(0, "mlp").double())
            gap.append((sample.h(3) - sample.h(1)).double())
            weight.append(sample.h(3).double().square().sum(-1).reciprocal() / n)
    x, gap, weight = torch.cat(x), torch.cat(gap), torch.cat(weight)[:, None]
    gram = x.mT @ (weight * x)
    exact = torch.linalg.inv(gram + 0.5 * gram.diagonal().mean() * torch.eye(len(gram))) @ x.mT @ (weight * gap)
    change = patch.updates[0, "mlp"].weight.double() - down_proj(vlm, 0).double()
    torch.testing.assert_close(change, exact.mT, atol=1e-4, rtol=1e-3)


def test_more_of_one_half_gives_it_no_more_weight():
    x, y, w = rows(12, 4), rows(12, 3, seed=1), torch.ones(12)

    def solution(times):
        halves = Halves()
        halves.add(x[:8], y[:8], w[:8], False)
        for _ in range(times):
            halves.add(x[8:], y[8:], w[8:], True)
        return halves.whole().solve(0.1)

    torch.testing.assert_close(solution(1), solution(5))
    alone, plain = Halves(), Regression()
    for at in (slice(0, 5), slice(5, 12)):
        alone.add(x[at], y[at], w[at], False)
        plain.add(x[at], y[at], w[at])
    assert torch.equal(alone.whole().solve(0.1), plain.solve(0.1))  # bit for bit
    none = Halves()
    none.add(x, y, 0 * w, False)
    none.add(x, y, w, True)
    with pytest.raises(SvlError, match="the selector leaves no token"):
        none.whole().solve(0.1)


def held_out_error(fitted, held_out, ridge):
    """The larger one of two halves' shares of what a ridge regression leaves, by an independent solve."""
    d = fitted[0][0].shape[1]
    gram = sum(x.mT @ x / len(x) for x, _ in fitted)
    cross = sum(x.mT @ y / len(x) for x, y in fitted)
    b = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(d).double(), cross)
    return max(float(((y - x @ b) ** 2).sum() / (y**2).sum()) for x, y in held_out)


@pytest.mark.parametrize("seed", range(6))
def test_the_ridge_is_the_one_whose_worse_half_is_best(seed):
    """Halves of different maps and noise: which of the ridges is best differs from case to case."""
    ridges, draw = (0.01, 0.3, 3.0, 30.0), torch.Generator().manual_seed(seed)
    maps = [torch.randn(6, 3, generator=draw).double() for _ in range(2)]
    chosen, parts = HeldOutRegression([*ridges, float("inf")], 3), {}
    for generated, b in enumerate(maps):
        for k in range(9):
            x = torch.randn(4, 6, generator=draw).double()
            y = x @ (maps[0] + seed / 5 * b) + 3 * torch.rand(1, generator=draw) * torch.randn(4, 3, generator=draw)
            chosen.add_sample(x, y, torch.ones(4), bool(generated))
            parts.setdefault((generated, k % 3 == 2), []).append((x, y))
    pairs = {key: tuple(map(torch.cat, zip(*found, strict=True))) for key, found in parts.items()}
    fitted, held_out = ([pairs[half, out] for half in (0, 1)] for out in (False, True))
    errors = {f"{ridge:g}": held_out_error(fitted, held_out, ridge) for ridge in ridges} | {"inf": 1.0}
    assert chosen.solve()[1].startswith(f"ridge {min(errors, key=errors.get)},")


def test_an_infinite_ridge_leaves_weights_as_they_are(lm, samples):
    hidden, plan = Activations(lm, samples, select(calibrate(lm, samples), All()), generated=TEXTS), Plan(4, (1,))
    patch = Refit(ridges=(float("inf"),)).fit(hidden, plan)
    assert patch.updates == {}
    assert patch.notes[0] == "layer 0 mlp: ridge inf, 100% of the gap left"
    deleted, refitted = apply(lm, plan), apply(lm, plan, patch)
    for (name, a), b in zip(deleted.model.named_parameters(), refitted.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_texts_come_last_and_weigh_1_whatever_the_selector(llava, samples):
    states = list(Activations(llava, samples, select(calibrate(llava, samples), Visual()), generated=TEXTS).stream([1]))
    assert [s.generated for s in states] == [False] * len(samples) + [True] * len(TEXTS)
    assert [bool((s.weights == 1).all()) for s in states] == [s.generated for s in states]
    steps = Activations(llava, samples, select(calibrate(llava, samples), Visual()), generated=TEXTS).walk(
        Plan(4, (1,))
    )
    assert [row.generated for row in next(steps).rows("mlp")] == [s.generated for s in states]
