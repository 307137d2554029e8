"""The least-squares core inside SCP's subspace, against regressions on stacked rows."""

from __future__ import annotations

import pytest
import torch
from helpers.streams import GivenSample, GivenStates, record

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.subspace import Subspace
from svl.compensation.subspace_fit import SubspaceFit
from svl.core import Plan, SvlError
from svl.selectors.all_tokens import All
from svl.selectors.visual import Visual

PLAN = Plan(3, (1,))


def given(core: torch.Tensor, noise: float = 0.0, n_samples: int = 10) -> tuple[GivenStates, torch.Tensor]:
    """Layer 1 of 3 is removed. Its effect is V core V^T of what layer 0 writes, plus noise; and V, [12, k]."""
    chance = torch.Generator().manual_seed(1)
    v = torch.linalg.qr(torch.randn(12, len(core), generator=chance)).Q
    samples = []
    for _ in range(n_samples):
        written, before, more = (torch.randn(9, 12, generator=chance) for _ in range(3))
        gap = written @ v @ core.mT @ v.mT + noise * more
        samples.append(GivenSample({1: before, 2: before + gap}, {(0, "mlp"): written}, torch.ones(3, 9)))
    return GivenStates(3, samples), v


def operator(patch, key=(0, "mlp")) -> torch.Tensor:
    update = patch.updates[key]
    return update.left @ update.right


def test_a_linear_effect_inside_the_subspace_is_found():
    core = torch.tensor([[2.0, 0.5, 0.0], [-1.0, 1.5, 0.3], [0.2, 0.0, -2.5]])
    states, v = given(core)
    patch = SubspaceFit(rank=3, ridges=(1e-9,)).fit(states, PLAN)
    torch.testing.assert_close(operator(patch), v @ core @ v.mT, atol=1e-4, rtol=0)
    assert "0% of the gap left" in patch.notes[-1]


def test_a_large_ridge_is_scp(lm, samples):
    hidden, plan = Activations(lm, samples, select(calibrate(lm, samples), All())), Plan(4, (1, 2))
    plain = operator(Subspace(rank=5).fit(hidden, plan))
    assert (operator(SubspaceFit(rank=5, ridges=(0.1,)).fit(hidden, plan)) - plain).abs().max() > 0.1
    torch.testing.assert_close(operator(SubspaceFit(rank=5, ridges=(1e9,)).fit(hidden, plan)), plain, atol=1e-5, rtol=0)


def test_the_core_is_the_regression_it_says(vlm, samples, encode):
    """With a ridge, by augmented rows, on the selected tokens of the layer before the run."""
    plan, ridge = Plan(4, (2,)), 0.3
    stats = select(calibrate(vlm, samples), Visual())
    chosen = [Visual().weights(trace).bool() for trace in stats.traces]
    seen = record(vlm, samples, encode)
    H = torch.cat([(s.states[3] - s.states[2])[w] for s, w in zip(seen, chosen, strict=True)])
    M = torch.cat([s.writes[1, "mlp"][w] for s, w in zip(seen, chosen, strict=True)])
    V = torch.linalg.svd(H, full_matrices=False).Vh[:4].mT
    x, y = M @ V, (H - M) @ V
    scale = (ridge * x.square().sum(0).mean()).sqrt()
    stacked = torch.cat([x, scale * torch.eye(4, dtype=x.dtype)])
    core = torch.eye(4) + torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(4, 4, dtype=y.dtype)])).solution.mT

    hidden = Activations(vlm, samples, stats, batch_size=2)
    patch = SubspaceFit(rank=4, ridges=(ridge,)).fit(hidden, plan)
    torch.testing.assert_close(operator(patch, (1, "mlp")).double(), V @ core @ V.mT, atol=1e-3, rtol=1e-3)


def test_the_ridge_is_the_best_on_samples_that_were_not_fitted():
    """Against every ridge fitted to eight samples of ten and tried on the fifth and the tenth, by normal equations."""
    states, _ = given(torch.tensor([[1.3, 0.0], [0.4, 0.8]]), noise=2.0)
    ridges = (1e-3, 0.03, 1.0, 30.0)
    gaps = [s.h(2) - s.h(1) for s in states.samples]
    V = torch.linalg.svd(torch.cat(gaps).double(), full_matrices=False).Vh[:2].mT
    x = [s.wrote(0, "mlp").double() @ V for s in states.samples]
    y = [gap.double() @ V - a for gap, a in zip(gaps, x, strict=True)]

    def error(ridge: float) -> float:
        fitted = [i for i in range(10) if i not in (4, 9)]
        a, b = torch.cat([x[i] for i in fitted]), torch.cat([y[i] for i in fitted])
        system = a.mT @ a + ridge * (a * a).sum(0).mean() * torch.eye(2)
        change = torch.linalg.inv(system) @ a.mT @ b
        return sum(float((y[i] - x[i] @ change).square().sum()) for i in (4, 9))

    best = min(ridges, key=error)
    assert best not in (ridges[0], ridges[-1])
    patch = SubspaceFit(rank=2, ridges=ridges).fit(states, PLAN)
    alone = SubspaceFit(rank=2, ridges=(best,)).fit(states, PLAN)
    torch.testing.assert_close(operator(patch), operator(alone))
    assert f"ridge {best:g}," in patch.notes[-1]


def test_runs_without_a_layer_before_them_are_noted(llava, samples):
    hidden = Activations(llava, samples, select(calibrate(llava, samples), All()))
    patch = SubspaceFit().fit(hidden, Plan(4, (0, 2)))
    assert list(patch.updates) == [(1, "mlp")]
    assert patch.notes[0] == "no layer before layer 0: its run is not compensated"
    assert not SubspaceFit().fit(hidden, Plan(4, (0,)))


def test_errors_are_plain(llama, make_samples):
    text = make_samples([3, 4], image=False)
    empty = Activations(llama, text, select(calibrate(llama, text), Visual()))
    with pytest.raises(SvlError, match="leaves no token for compensation"):
        SubspaceFit().fit(empty, Plan(4, (1,)))
    with pytest.raises(SvlError, match="rank is 33, but the model is only 32 wide"):
        SubspaceFit(rank=33, rows="all").fit(empty, Plan(4, (1,)))
    for wrong in ({"rank": 0}, {"rows": "means"}, {"ridges": ()}, {"ridges": (0.0,)}, {"fold": 1}):
        with pytest.raises(SvlError, match=f"compensation.{next(iter(wrong))}"):
            SubspaceFit(**wrong)
