"""Fits to fewer samples than one in `fold`, and to nothing at all."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.streams import GivenSample, GivenStates

from svl.compensation.ghosted import Ghosted
from svl.compensation.linear import Linear
from svl.compensation.mean_update import MeanUpdate
from svl.compensation.regression import HeldOutRegression
from svl.compensation.subspace import Subspace
from svl.compensation.subspace_fit import SubspaceFit
from svl.core import Patch, Plan, SvlError

RIDGES = (0.01, 0.3, 3.0, 30.0)


def draw(n_samples, seed, noise=2.0):
    """Samples (x [7, 6], y [7, 3]) of one map with noise."""
    chance = torch.Generator().manual_seed(seed)
    b = torch.randn(6, 3, generator=chance)
    made = [(torch.randn(7, 6, generator=chance), torch.randn(7, 3, generator=chance)) for _ in range(n_samples)]
    return [(x.double(), (x @ b + noise * more).double()) for x, more in made]


def ridge_fit(samples, ridge):
    """By least squares with the ridge as rows."""
    x, y = (torch.cat(part) for part in zip(*samples, strict=True))
    size = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(6)
    return torch.linalg.lstsq(torch.cat([x, size]), torch.cat([y, torch.zeros(6, 3)])).solution


def regression(samples, ridges=RIDGES, fold=5):
    found = HeldOutRegression(ridges, fold)
    for x, y in samples:
        found.add_sample(x, y, torch.ones(7), False)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 11])
def test_the_ridge_is_chosen_on_the_last_of_few_samples(n, seed):
    """Of fold samples or more, on every one that is a multiple of it; the final fit is to all of them."""
    samples = draw(n, seed)
    out = [i for i in range(n) if (i + 1) % 5 == 0] or [n - 1]
    fitted = [samples[i] for i in range(n) if i not in out]

    def error(ridge):
        b = ridge_fit(fitted, ridge)
        return sum(float((samples[i][1] - samples[i][0] @ b).square().sum()) for i in out)

    best = min(RIDGES, key=error)
    solution, note = regression(samples).solve()
    torch.testing.assert_close(solution, ridge_fit(samples, best))
    told = f" (by the last of {n} samples)" if n < 5 else ""
    assert note.startswith(f"ridge {best:g}{told}, ")
    assert regression(samples, RIDGES[::-1]).solve()[1] == note  # in any order


def test_the_seeds_above_do_not_all_choose_the_same():
    assert len({regression(draw(n, seed)).solve()[1].split(",")[0] for n in (2, 4) for seed in range(4)}) > 2


def test_one_sample_takes_the_largest_ridge():
    samples = draw(1, 0)
    solution, note = regression(samples).solve()
    torch.testing.assert_close(solution, ridge_fit(samples, 30.0))
    assert note.startswith("ridge 30 (the largest: 1 sample can tell none from another), ")
    solution, note = regression(samples, (*RIDGES, math.inf)).solve()
    assert not solution.any()
    assert "100% of the gap left" in note
    torch.testing.assert_close(regression(samples, (0.3,)).solve()[0], ridge_fit(samples, 0.3))  # as it is


def test_a_sample_without_a_selected_token_chooses_nothing():
    found = regression(draw(1, 0))
    x, y = draw(1, 1)[0]
    found.add_sample(x, y, torch.zeros(7), False)
    solution, note = found.solve()
    torch.testing.assert_close(solution, ridge_fit(draw(1, 0), 30.0))
    assert "the largest: 2 samples" in note
    mixed = HeldOutRegression(RIDGES, 5)  # what is held out has rows of both kinds, the rest only generated ones
    for weight, generated in ((0.0, False), (1.0, False), (1.0, True), (1.0, True)):
        mixed.add_sample(x, y, torch.full((7,), weight), generated)
    assert "the largest: 4 samples" in mixed.solve()[1]
    empty = HeldOutRegression(RIDGES, 5)
    empty.add_sample(x, y, torch.zeros(7), False)
    with pytest.raises(SvlError, match="the selector leaves no token"):
        empty.solve()


def states(written, gap, n_samples=1):
    chance = torch.Generator().manual_seed(3)
    before = torch.randn(9, 12, generator=chance)
    sample = GivenSample({1: before, 2: before + gap}, {(0, "mlp"): written}, torch.ones(3, 9))
    return GivenStates(3, [sample] * n_samples)


def test_ghosted_changes_nothing_for_one_sample():
    gap = torch.randn(9, 12, generator=torch.Generator().manual_seed(4))
    patch = Ghosted().fit(states(gap, gap), Plan(3, (1,)))
    assert torch.equal(patch.maps[1], torch.eye(12))
    assert "100% of the gap left" in patch.notes[0]


# ---------------------------------------------------------------------------------------------------- nothing to fit

NOTHING, SOMETHING = torch.zeros(9, 12), torch.randn(9, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("n_samples", [1, 5])
def test_a_gap_of_zero_is_no_error(n_samples):
    given, plan = states(SOMETHING, NOTHING, n_samples), Plan(3, (1,))
    patch = SubspaceFit(rank=4).fit(given, plan)
    assert patch == Patch(notes=("layers 1..1 leave no gap that layer 0 could fill",))
    for compensation in (Linear(), MeanUpdate(), Ghosted()):
        patch = compensation.fit(given, plan)
        for update in patch.updates.values():
            assert float((update.left if update.right is None else update.left @ update.right).abs().max()) < 1e-9
        assert all(torch.equal(found, torch.eye(12)) for found in patch.maps.values())


@pytest.mark.parametrize("n_samples", [1, 5])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_what_writes_nothing_is_left_as_it_is(ridge, n_samples):
    given, plan = states(NOTHING, SOMETHING, n_samples), Plan(3, (1,))
    patch = Linear(ridge=ridge).fit(given, plan)
    assert not patch.updates[0, "mlp"].left.any()
    assert patch.notes == ("mlp of layer 0 writes nothing, so it fills no gap",)
    patch = MeanUpdate(ridge=ridge).fit(given, plan)
    assert not (patch.updates[0, "mlp"].left @ patch.updates[0, "mlp"].right).any()
    assert "100% of it missed" in patch.notes[0]
    for compensation in (SubspaceFit(rank=4), Subspace()):
        assert compensation.fit(given, plan).updates.keys() == {(0, "mlp")}


def test_a_ridge_that_is_too_small_is_named():
    few = torch.randn(2, 12, generator=torch.Generator().manual_seed(6)).repeat(5, 1)[:9]
    with pytest.raises(SvlError, match=r"too few independent tokens for a fit with a ridge of 1e-20; choose a larger"):
        Linear(ridge=1e-20).fit(states(few, SOMETHING), Plan(3, (1,)))
