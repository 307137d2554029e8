"""What was measured, and plans from importances."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from svl.calibration.calibrate import calibrate, check_selector, select
from svl.core import Stats, SvlError, TokenTrace
from svl.selectors.all_tokens import All
from svl.selectors.last import Last
from svl.selectors.text import Text
from svl.selectors.tis import Tis
from svl.selectors.visual import Visual
from svl.strategies.cosine import Cosine
from svl.strategies.random import Random as RandomLayers
from svl.strategies.tail import Tail


def trace(cosine: list[list[float]], visual: list[bool], index: int = 0) -> TokenTrace:
    return TokenTrace(index, torch.tensor(visual), torch.tensor(cosine))


TRACES = (trace([[0.9, 0.1], [0.5, 0.4], [0.2, 0.8]], [True, False]), trace([[0.3], [0.6], [0.4]], [False]))


@pytest.mark.parametrize(
    ("selector", "cosine"),
    [
        (All(), [1.3 / 3, 0.5, 1.4 / 3]),  # a mean over tokens, not over samples
        (Visual(), [0.9, 0.5, 0.2]),
        (Text(), [0.2, 0.5, 0.6]),
        (Last(), [0.2, 0.5, 0.6]),
    ],
)
def test_the_lowest_cosines_stay(selector, cosine):
    stats = Stats(3, (0, 1, 2), TRACES, selector)
    torch.testing.assert_close(stats.cosine(), torch.tensor(cosine, dtype=torch.float64))
    for n in range(3):
        plan = Cosine().plan(stats, n)
        assert plan.removed == tuple(sorted(sorted(range(3), key=lambda i: -cosine[i])[:n]))
        assert plan.importance == pytest.approx([1 - c for c in cosine])


def test_of_equal_layers_the_deeper_goes_first():
    assert Stats(4, (0, 1, 2, 3)).plan(torch.tensor([0.5, 0.1, 0.1, 0.1]), 2).removed == (2, 3)


def test_protected_layers_stay():
    stats = Stats(4, (1, 3))
    assert stats.plan(torch.tensor([0.0, 0.2, 0.0, 0.3]), 1).removed == (1,)
    for strategy in (Tail(), *(RandomLayers(seed) for seed in range(5))):
        assert strategy.plan(stats, 2).removed == (1, 3)
    with pytest.raises(SvlError, match="cannot remove 3 of 4 decoder layers: at most 2 may go"):
        Tail().plan(stats, 3)


@pytest.mark.parametrize("strategy", [Tail(), RandomLayers(), Cosine()])
@pytest.mark.parametrize("n", [-1, 3])
def test_impossible_numbers_of_layers_are_refused(strategy, n):
    with pytest.raises(SvlError, match=f"cannot remove {n} of 3"):
        strategy.plan(Stats(3, (0, 1, 2), TRACES, All()), n)


def test_importance_must_be_finite():
    with pytest.raises(SvlError, match="layer importance is not finite"):
        Stats(2, (0, 1)).plan(torch.tensor([float("nan"), 0.1]), 1)
    with pytest.raises(SvlError, match="layer importance is not finite"):
        Cosine().plan(Stats(2, (0, 1), [trace([[0.1], [float("inf")]], [True])], All()), 1)


def test_a_selector_that_leaves_no_token_is_named(llama, make_samples):
    text = calibrate(llama, make_samples([3, 5], image=False))
    with pytest.raises(SvlError, match="selector 'visual' leaves no token"):
        select(text, Visual()).cosine()
    check_selector(llama, make_samples([3], image=False), Tis())  # needs a measurement: known later
    check_selector(llama, make_samples([3], image=False), Text())
    with pytest.raises(SvlError, match="selector 'visual' leaves no token"):
        check_selector(llama, make_samples([3], image=False), Visual())
    with pytest.raises(SvlError, match="selector 'all' leaves no token"):
        Stats(2, (0, 1), [], All()).cosine()
    with pytest.raises(SvlError, match="needs a token selector"):
        text.cosine()


def test_another_selector_is_all_that_select_changes():
    stats = Stats(3, (0, 2), (), probe=object(), rescoring=object(), gone=(1,), kinds=(0, None, 0))
    seen = select(stats, Visual())
    assert {f.name: getattr(seen, f.name) for f in fields(Stats)} == {
        **{f.name: getattr(stats, f.name) for f in fields(Stats)}, "selector": Visual()
    }  # fmt: skip
