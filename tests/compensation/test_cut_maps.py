"""Maps at cuts: what they are by hand and by slow references, and how little a fold has to do with them."""

from __future__ import annotations

import pytest
import torch
from helpers.streams import GivenSample, GivenStates, record
from torch import Tensor

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.ghosted import Ghosted
from svl.compensation.hadamard import orthonormal_hadamard
from svl.compensation.linearpatch import LinearPatch
from svl.core import Plan, SvlError
from svl.pruning.cut_maps import CutMap
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All


@pytest.fixture
def hidden(lm, samples):
    return Activations(lm, samples, select(calibrate(lm, samples), All()), batch_size=2)


# ---------------------------------------------------------------------------------------- Hadamard matrices


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 32, 36, 44, 84, 104, 180, 576, 896, 960, 1152])
def test_hadamard_matrices_are_orthonormal_and_of_one_size(order):
    basis = orthonormal_hadamard(order)
    torch.testing.assert_close(basis @ basis.T, torch.eye(order).double())
    torch.testing.assert_close(basis.abs(), torch.full_like(basis, order**-0.5))


def test_of_powers_of_two_they_are_sylvesters():
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    torch.testing.assert_close(orthonormal_hadamard(16), Tensor(signs).double() / 4)


@pytest.mark.parametrize("order", [3, 6, 7, 52, 30])
def test_widths_without_a_known_one_are_errors(order):
    with pytest.raises(SvlError, match=rf"no Hadamard matrix of order {order} .* compensation\.rotate=false"):
        orthonormal_hadamard(order)


# --------------------------------------------------------------------------------------------- LinearPatch


def test_channels_grow_as_they_would_have():
    """Channel 0 by 2 / 1 and 4 / 2, channel 1 by 3 / 2 and 1 / 2: by 2 and by 1 on average."""
    first = GivenSample({1: Tensor([[1, 1], [-1, 3]]), 2: Tensor([[-3, 2], [1, 4]])}, {}, torch.ones(4, 2))
    second = GivenSample({1: Tensor([[2, 2]]), 2: Tensor([[-4, 1]])}, {}, torch.ones(4, 1))
    patch = LinearPatch(rotate=False).fit(GivenStates(4, [first, second]), Plan(4, (1,)))
    torch.testing.assert_close(patch.maps, {1: torch.diag(Tensor([2.0, 1.0]))})
    assert patch.notes == ("layers 1..1: channels grow by 1.000 to 2.000",)


def test_selected_tokens_alone_count_if_asked_to():
    weights = Tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])  # those of layer 1 count
    states = {1: Tensor([[1, 2], [5, 5]]), 2: Tensor([[4, 2], [7, 9]])}
    unselected = GivenSample(states, {}, torch.zeros(4, 2))
    given = GivenStates(4, [GivenSample(states, {}, weights), unselected])
    found = LinearPatch(rotate=False, rows="selected").fit(given, Plan(4, (1,)))
    torch.testing.assert_close(found.maps, {1: torch.diag(Tensor([4.0, 1.0]))})
    for method in (LinearPatch(rows="selected"), Ghosted(rows="selected")):
        with pytest.raises(SvlError, match="leaves no token for compensation"):
            method.fit(GivenStates(4, [unselected]), Plan(4, (1,)))


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0), (1.0, float("nan"))])
def test_channels_without_a_size_are_errors(before, after):
    states = {1: torch.full((2, 2), before), 2: torch.full((2, 2), after)}
    with pytest.raises(SvlError, match=r"across layers 1\.\.1, a channel grows by a factor that is no positive"):
        LinearPatch(rotate=False).fit(GivenStates(3, [GivenSample(states, {}, torch.ones(3, 2))]), Plan(3, (1,)))


@pytest.mark.parametrize("removed", [(1, 2), (0, 2), (3,)], ids=str)
def test_scales_are_those_of_rotated_states_channel_by_channel(removed, lm, samples, encode, hidden):
    """Against states of single forward passes, rotated one channel at a time; the widths of rows are 32 = 2^5."""
    plan, seen = Plan(4, removed), record(lm, samples, encode)
    found = LinearPatch().fit(hidden, plan).maps
    assert sorted(found) == [start for start, _ in plan.runs]
    for start, stop in plan.runs:
        expected = torch.zeros(32, 32, dtype=torch.float64)
        for k in range(32):
            channel = Tensor([(-1.0) ** (i & k).bit_count() for i in range(32)]).double() / 32**0.5
            sizes = [[(s.states[i] @ channel).abs().mean() for i in (start, stop)] for s in seen]
            factor = sum(after / before for before, after in sizes) / len(sizes)
            expected += factor * torch.outer(channel, channel)
        torch.testing.assert_close(found[start], expected.float(), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- Ghosted


def random_samples(change: Tensor, n: int = 10, noise: float = 0.0) -> GivenStates:
    """Samples of 12 tokens whose states grow by `change` (h (I + change), plus noise) in layer 1 of 3."""
    chance, made = torch.Generator().manual_seed(3), []
    for _ in range(n):
        before = torch.randn(12, len(change), generator=chance)
        after = before + before @ change + noise * torch.randn(12, len(change), generator=chance)
        made.append(GivenSample({1: before, 2: after}, {}, torch.ones(3, 12)))
    return GivenStates(3, made)


def test_a_change_that_is_linear_is_found():
    change = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / 3
    patch = Ghosted().fit(random_samples(change), Plan(3, (1,)))
    torch.testing.assert_close(patch.maps, {1: (torch.eye(8) + change).T}, atol=1e-5, rtol=0)
    assert patch.notes == ("layers 1..1: ridge 1e-08, 0% of the gap left",)


def test_the_ridge_is_the_one_that_errs_least_on_held_out_samples():
    """With noise and hardly more tokens than channels, a fit that shrinks is closer to new samples."""
    change = 0.05 * torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    given = random_samples(change, n=5, noise=1.0)
    patch = Ghosted(ridges=(1e-8, 10.0)).fit(given, Plan(3, (1,)))
    assert "ridge 10," in patch.notes[0]

    def left(ridge: float) -> float:
        """On the fifth sample, after a fit to the first four, in the plainest terms."""
        x, y = (torch.cat([s.states[i] for s in given.samples[:4]]).double() for i in (1, 2))
        size = ridge * (x * x).sum() / 40
        fit = torch.linalg.solve(x.T @ x + size * torch.eye(40), x.T @ (y - x))
        last = given.samples[4].states
        return float((last[2] - last[1] - last[1].double() @ fit).square().sum())

    assert left(10.0) < left(1e-8)


def test_maps_of_models_are_least_squares_of_their_states(lm, samples, encode, hidden):
    """Against a solver of least squares on the stacked states of single forward passes, with the ridge as rows."""
    plan, seen = Plan(4, (1, 2)), record(lm, samples, encode)
    found = Ghosted(ridges=(1e-3,)).fit(hidden, plan).maps[1]
    x = torch.cat([s.states[1] for s in seen])
    y = torch.cat([s.states[3] for s in seen]) - x
    size = (1e-3 * x.square().sum() / 32).sqrt() * torch.eye(32)
    fit = torch.linalg.lstsq(torch.cat([x, size]), torch.cat([y, torch.zeros(32, 32)]), driver="gelsd").solution
    torch.testing.assert_close(found, (torch.eye(32) + fit).T.float(), atol=2e-3, rtol=1e-3)


def test_layers_one_by_one_multiply(lm, samples, hidden):
    single = [Ghosted(ridges=(1e-3,)).fit(hidden, Plan(4, (i,))).maps[i] for i in (1, 2)]
    patch = Ghosted(ridges=(1e-3,), scope="layer").fit(hidden, Plan(4, (1, 2)))
    torch.testing.assert_close(patch.maps, {1: single[1] @ single[0]}, atol=1e-4, rtol=1e-4)
    assert [note.partition(":")[0] for note in patch.notes] == ["layers 1..1", "layers 2..2"]


@pytest.mark.parametrize("removed", [(1, 2), (2,)], ids=str)
def test_states_behind_the_cut_are_closest_by_least_squares(removed, lm, samples, encode, hidden):
    """On the samples of the fit, and of all maps: than without any, and than by scales."""
    plan, seen = Plan(4, removed), record(lm, samples, encode)
    (_, stop), left = plan.runs[0], {}
    methods = {"none": None, "rotated": LinearPatch(), "plain": LinearPatch(rotate=False), "ghosted": Ghosted((1e-8,))}
    for name, method in methods.items():
        pruned = apply(lm, plan, method.fit(hidden, plan) if method else None)
        at = plan.kept.index(stop) if stop < 4 else len(plan.kept)
        ours = record(pruned, samples, encode)
        states = [(s.states[at], d.states[stop]) for s, d in zip(ours, seen, strict=True)]
        left[name] = float(sum((a - b).square().sum() for a, b in states))
    assert left["ghosted"] < min(left["none"], left["rotated"], left["plain"])
    assert left["ghosted"] < 0.6 * left["none"]


def test_nothing_is_done_without_a_cut(llava, samples):
    hidden = Activations(llava, samples, select(calibrate(llava, samples), All()))
    assert not LinearPatch().fit(hidden, Plan(4, ()))
    assert not Ghosted().fit(hidden, Plan(4, ()))


@pytest.mark.parametrize("setting", [{"scope": "both"}, {"rows": "some"}, {"ridges": (0.0,)}, {"fold": 1}])
def test_settings_are_checked(setting):
    with pytest.raises(SvlError, match=rf"compensation\.{next(iter(setting))}"):
        Ghosted(**setting)


def test_a_map_computes_in_fp32_also_where_products_run_in_bfloat16():
    cut, state = CutMap(32), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    cut.weight = torch.nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    expected = state @ cut.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cut(state), expected)
