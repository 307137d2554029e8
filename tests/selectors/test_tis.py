"""The selector of Short-LVLM, token importance scores."""

from __future__ import annotations

import pytest
import torch

from svl.calibration.calibrate import calibrate
from svl.core import SvlError, TokenTrace
from svl.selectors.tis import Tis


@pytest.mark.parametrize("wrong", [{"p": 0}, {"p": 1.1}, {"rule": "top"}, {"pool": "all"}, {"layers": "last"},
                                   {"layers": "-1"}, {"text_self": "both"}, {"skip": -1}])  # fmt: skip
def test_wrong_tis_settings_are_refused(wrong):
    with pytest.raises(SvlError, match=f"selector.{next(iter(wrong))}"):
        Tis(**wrong)


def test_tis_of_a_missing_layer_is_refused(llava, samples):
    (first, *_) = calibrate(llava, samples).traces
    assert Tis(layers="3").weights(first).shape == first.visual.shape
    with pytest.raises(SvlError, match=r"layers is 4, but the model has layers 0\.\.3"):
        Tis(layers="4").weights(first)


def test_tis_works_on_text_alone(llama, make_samples):
    """No image, so no cross-modal attention: the score is half the attention from text."""
    (first,) = calibrate(llama, make_samples([6], image=False)).traces
    T = len(first.visual)
    expected = (first.received[:, 1] / torch.arange(T, 0, -1) / 2).mean(0)
    torch.testing.assert_close(Tis().scores(first).float(), expected)
    for pool in ("joint", "modality"):
        assert Tis(pool=pool).weights(first).sum() == (T + 1) // 2


def test_tis_of_tokens_that_see_nothing_or_are_not_seen_is_finite():
    """A text in front of a picture at the end, attention ((1, 0), (0.3, 0.7)): neither has a cross-modal term."""
    sums = {"received": [[0.3, 0.7], [1, 0]], "emitted": [[0, 0.7], [1, 0.3]]}
    counts = {"queries": [[1, 1], [1, 0]], "keys": [[0, 1], [1, 1]]}
    measured = {name: torch.tensor([rows]) for name, rows in (sums | counts).items()}
    assert Tis().scores(TokenTrace(0, torch.tensor([False, True]), **measured)).tolist() == pytest.approx([0.5, 0.35])


def test_tis_takes_the_exact_fraction_and_of_equals_the_earlier():
    text = torch.zeros(25, dtype=torch.bool)
    assert Tis(p=0.28)._top(torch.ones(25), text).tolist() == [1] * 7 + [0] * 18  # 0.28 * 25 is 7.000000000000001
    noisy = torch.tensor([0.2, 0.2 + 1e-8, 0.2 - 1e-8, 0.2001], dtype=torch.float64)  # equal but for rounding errors
    assert Tis(p=0.5)._top(noisy, text[:4]).tolist() == [1, 0, 0, 1]
    assert Tis(p=0.5, rule="nucleus")._top(torch.zeros(4), text[:4]).tolist() == [1, 0, 0, 0]


def test_skipped_tokens_are_never_chosen(llava, samples):
    for trace in calibrate(llava, samples).traces:
        for pool in ("joint", "modality"):
            usual, late = (Tis(pool=pool, p=1.0, skip=n).weights(trace) for n in (0, 2))
            assert bool(usual.all())
            assert late.tolist() == [0, 0] + [1] * (len(trace.visual) - 2)
        rest, scores = Tis(p=0.5, skip=2).weights(trace), Tis().scores(trace)[2:]
        assert rest[:2].tolist() == [0, 0]
        assert rest[2:].sum() == (len(scores) + 1) // 2  # half of those that are left
        assert scores[rest[2:].bool()].min() >= scores[~rest[2:].bool()].max()
    assert Tis(skip=10**6).weights(trace).sum() == 0
