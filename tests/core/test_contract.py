"""What methods of others may answer, and how their mistakes are reported: one line that names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, check_selector, select
from svl.core import (
    Compensation,
    Patch,
    Plan,
    Stats,
    Strategy,
    SvlError,
    TokenSelector,
    TokenTrace,
    Update,
    checked_plan,
    checked_weights,
    fitted_patch,
)

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Chosen(Strategy):
    """Answers what it was made with."""

    answer: Any = None

    def plan(self, stats, n_remove):
        return self.answer(stats) if callable(self.answer) else self.answer


@dataclass(frozen=True)
class Weighing(TokenSelector):
    """Answers what it was made with."""

    answer: Any = field(default=None, compare=False)

    def weights(self, trace):
        return self.answer


@dataclass(frozen=True)
class Patching(Compensation):
    """Answers what it was made with."""

    answer: Any = field(default=None, compare=False)

    def fit(self, hidden, plan):
        return self.answer(hidden) if callable(self.answer) else self.answer


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --------------------------------------------------------------------------------------------- strategies


def test_a_strategy_needs_nothing_unless_it_says_so():
    assert Chosen.needs == Weighing.needs == Patching.needs == frozenset()
    assert checked_plan(Chosen(Plan(4, (1, 2))), Stats(4, (0, 1, 2, 3)), 2).removed == (1, 2)


def test_numbers_of_numpy_and_torch_become_plain_ones():
    plan = checked_plan(Chosen(lambda stats: Plan(np.int64(4), tuple(np.array([2, 1])))), Stats(4, (0, 1, 2, 3)), 2)
    assert (plan.n_layers, plan.removed) == (4, (1, 2))
    assert all(type(i) is int for i in (plan.n_layers, *plan.removed))
    assert '"removed": [\n  1,\n  2\n ]' in plan.to_json()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "gives NoneType, but must give a Plan"),
        ((1, 2), "gives tuple, but must give a Plan"),
        (Plan(5, (1,)), "gives a plan for 5 layers, but the model has 4"),
        (Plan(4, (0,)), r"removes layers \[0\], which are protected; layers \[1, 2, 3\] may go"),
        (lambda stats: Plan(4, (1.5,)), r"a removed layer is 1\.5, but must be a whole number"),
        (lambda stats: Plan(4, (7,)), r"removes layers \[7\], but the model has layers 0\.\.3"),
        (lambda stats: stats.cosine(), "needs a token selector"),
    ],
)
def test_a_wrong_plan_is_one_line_that_names_the_strategy(answer, message):
    with pytest.raises(SvlError, match=message) as caught:
        checked_plan(Chosen(answer), Stats(4, (1, 2, 3)), 1)
    assert f"{__name__}.Chosen" in one_line(caught)


# ---------------------------------------------------------------------------------------------- selectors

TRACE = TokenTrace(0, torch.tensor([True, False, False]))


@pytest.mark.parametrize(
    "answer", [torch.tensor([0.0, 1.0, 0.5]), torch.ones(2, 3), torch.tensor([True, False, True]), torch.zeros(3)]
)
def test_weights_of_every_kind_are_taken_as_they_are(answer):
    assert checked_weights(Weighing(answer), TRACE, 2) is answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "gives NoneType as weights, but must give a tensor"),
        (np.ones(3), "gives ndarray as weights"),
        ([1, 1, 1], "gives list as weights"),
        (torch.ones(4), r"weights of shape \[4\], but must give \[3\] or \[2, 3\]"),
        (torch.ones(3, 3), r"weights of shape \[3, 3\], but"),
        (torch.ones(3, 1), r"weights of shape \[3, 1\], but"),
        (torch.ones(1, 2, 3), "weights of shape"),
        (torch.tensor(1.0), r"weights of shape \[\], but"),
        (torch.tensor([0, 1, NAN]), r"weights outside \[0, 1\]"),
        (torch.tensor([0, 1, INF]), r"weights outside \[0, 1\]"),
        (torch.tensor([0, 1, 1.5]), r"weights outside \[0, 1\]"),
        (torch.tensor([0, 1, -0.1]), r"weights outside \[0, 1\]"),
        (torch.tensor([0, 1, 1j]), r"gives torch\.complex64 weights"),
        (torch.ones(3, device="meta"), "weights on meta, but must give numbers on the CPU"),
    ],
)
def test_wrong_weights_are_one_line_that_names_the_selector(answer, message):
    with pytest.raises(SvlError, match=message) as caught:
        checked_weights(Weighing(answer), TRACE, 2)
    assert f"{__name__}.Weighing" in one_line(caught)


def test_weights_are_checked_wherever_a_selector_is_asked(llama, make_samples):
    data, wrong = make_samples([3, 5], image=False), Weighing(torch.ones(1))
    stats = select(calibrate(llama, data, statistics=["cosine"]), wrong)
    for ask in (
        lambda: check_selector(llama, data, wrong),
        stats.cosine,
        lambda: list(Activations(llama, data, stats).stream([1])),
        lambda: list(Activations(llama, data, stats).walk(Plan(4, (1,)))),
    ):
        with pytest.raises(SvlError, match="Weighing gives weights of shape"):
            ask()


# ------------------------------------------------------------------------------------------ compensations


def test_a_patch_of_kept_layers_is_taken_as_it_is():
    patch = Patch({(0, "mlp"): Update(left=torch.ones(4, 1), right=torch.ones(1, 4))}, {2: {1: 0.5, 2: 0.5}})
    assert fitted_patch(Patching(patch), None, Plan(4, (1,))) is patch


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (None, "gives NoneType, but must give a Patch"),
        ({}, "gives dict, but must give a Patch"),
        (Patch({(1, "mlp"): Update()}), r"changes layers \[1\], which the plan does not keep"),
        (Patch(blends={9: {0: 1.0}}), r"changes layers \[9\], which the plan does not keep"),
        (Patch({(0, "mlp"): Update(delta=torch.tensor([[NAN]]))}), "change of 'mlp' of layer 0 that is not finite"),
        (Patch({(0, "mlp"): Update(left=torch.tensor([[INF]]))}), "change of 'mlp' of layer 0 that is not finite"),
        (Patch({(0, "attn"): Update(shift=torch.tensor([NAN]))}), "change of 'attn' of layer 0 that is not finite"),
        (Patch({(0, "attn"): Update(scale=NAN)}), "change of 'attn' of layer 0 that is not finite"),
        (Patch(blends={2: {0: NAN}}), "blends layer 2 with coefficients that are not finite"),
        (Patch({0: Update()}), r"a patch that is not as svl\.core\.Patch says: TypeError"),
        (Patch({(0, "mlp"): torch.ones(4, 4)}), r"a patch that is not as svl\.core\.Patch says: AttributeError"),
        (Patch({(0, "mlp"): Update(left=np.ones((4, 4)))}), "not as svl.core.Patch says: AttributeError"),
        (Patch({(0, "mlp"): Update(left=[1.0])}), "not as svl.core.Patch says: AttributeError"),
        (Patch(blends={2: {0: None}}), "not as svl.core.Patch says: TypeError"),
        (Patch(blends={2: 1.0}), "not as svl.core.Patch says: AttributeError"),
    ],
)
def test_a_wrong_patch_is_one_line_that_names_the_compensation(patch, message):
    with pytest.raises(SvlError, match=message) as caught:
        fitted_patch(Patching(patch), None, Plan(4, (1,)))
    assert f"{__name__}.Patching" in one_line(caught)
