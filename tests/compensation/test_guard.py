"""The guard of SCP: massive activations that the anchor writes are left out of what is amplified."""

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
from svl.selectors.tis import Tis

AXES = torch.eye(5)


def given(writes: torch.Tensor, gaps: torch.Tensor, weights: torch.Tensor | None = None) -> GivenStates:
    """Layer 1 of 3 is removed: layer 0 writes `writes`, layer 1 would add `gaps`; in two samples."""
    weights = torch.ones(len(writes)) if weights is None else weights
    before = torch.randn(gaps.shape, generator=torch.Generator().manual_seed(5))
    samples = [
        GivenSample({1: h, 2: h + gap}, {(0, "mlp"): m, (0, "attn"): m.flip(1)}, w.expand(3, -1))
        for h, gap, m, w in zip(before.split(4), gaps.split(4), writes.split(4), weights.split(4), strict=True)
    ]
    return GivenStates(3, samples)


PLAN = Plan(3, (1,))
WRITES = torch.cat([100 * AXES[:1], AXES[1:], AXES[2:]])  # token 0 gets 100 times what others get, along axis 0
GAPS = torch.cat([8 * AXES[:1], 4 * AXES[1:2], 2 * AXES[2:3], AXES[3:4], AXES[:4]])  # largest along axes 0, 1, 2, 3


def projector(patch, layer=0, role="mlp"):
    update = patch.updates[layer, role]
    return update.left @ update.right


def axes(*numbers: int) -> torch.Tensor:
    return torch.diag(torch.tensor([float(i in numbers) for i in range(5)]))


def test_the_direction_of_a_massive_write_is_not_amplified():
    states = given(WRITES, GAPS)
    torch.testing.assert_close(projector(Subspace(rank=2).fit(states, PLAN)), axes(0, 1))
    patch = Subspace(rank=2, guard=25).fit(states, PLAN)
    torch.testing.assert_close(projector(patch), axes(1, 2))
    assert patch.notes == (
        "mlp of layer 0 writes up to 100.0 times its median norm: the guard leaves that direction out",
    )
    torch.testing.assert_close(torch.tensor(patch.spectra[0][:4]), torch.tensor([65, 17, 5, 2]).sqrt())


def test_every_projection_has_a_guard_of_its_own():
    """What o_proj writes here is massive along axis 4, which no gap has: its directions stay the paper's."""
    patch = Subspace(rank=2, guard=25, targets=("attn", "mlp")).fit(given(WRITES, GAPS), PLAN)
    torch.testing.assert_close(projector(patch, role="attn"), axes(0, 1))
    torch.testing.assert_close(projector(patch, role="mlp"), axes(1, 2))
    assert len(patch.notes) == 2


def test_tokens_that_are_not_selected_count_for_the_guard():
    """The change of the weight reaches them, too."""
    weights = torch.ones(8)
    weights[0] = 0
    gaps = GAPS.clone()
    gaps[4] = 9 * AXES[0]  # still the largest direction of the selected tokens
    torch.testing.assert_close(projector(Subspace(rank=1).fit(given(WRITES, gaps, weights), PLAN)), axes(0))
    torch.testing.assert_close(projector(Subspace(rank=1, guard=25).fit(given(WRITES, gaps, weights), PLAN)), axes(1))


@pytest.mark.parametrize(("guard", "passes"), [(None, 1), (100.001, 1), (99.999, 2)])
def test_the_guard_acts_above_its_multiple_of_the_median_only(guard, passes):
    states = given(WRITES, GAPS)
    patch = Subspace(rank=2, guard=guard).fit(states, PLAN)
    assert len(states.passes) == passes
    assert bool(patch.notes) == (passes == 2)
    paper = Subspace(rank=2).fit(given(WRITES, GAPS), PLAN)
    same = torch.equal(patch.updates[0, "mlp"].left, paper.updates[0, "mlp"].left)
    assert same == (passes == 1)


def test_several_massive_tokens_have_one_leading_direction():
    writes = WRITES.clone()
    writes[1], writes[2] = 90 * AXES[0], 50 * AXES[1]  # axis 0 leads, with 100 and 90 against 50
    torch.testing.assert_close(projector(Subspace(rank=2, guard=25).fit(given(writes, GAPS), PLAN)), axes(1, 2))
    writes[2] = 200 * AXES[1]  # now axis 1 does
    torch.testing.assert_close(projector(Subspace(rank=2, guard=25).fit(given(writes, GAPS), PLAN)), axes(0, 2))


@pytest.mark.parametrize("guard", [0, 0.5, -3, float("nan")])
def test_guards_that_are_none_are_refused(guard):
    for method in (Subspace, SubspaceFit):
        with pytest.raises(SvlError, match=r"compensation\.guard is .* at least 1, or null"):
            method(guard=guard)


@pytest.mark.parametrize(
    ("rows", "anchor", "centered", "target"),
    [
        ("selected", "before", False, "mlp"),
        ("all", "before", True, "mlp"),
        ("means", "before", False, "attn"),
        ("selected", "after", True, "mlp"),
        ("selected", "before", False, "attn"),
    ],
)
def test_guarded_scp_is_the_svd_of_stacked_rows(rows, anchor, centered, target, vlm, samples, encode):
    """On a model: B, q and V from the rows themselves, stacked, without any Gram matrix."""
    plan, guard, selector = Plan(4, (1, 2)), 1.3, Tis(p=0.4, layers="each")
    stats = select(calibrate(vlm, samples), selector)
    kept, away = (0, 2) if anchor == "before" else (3, 1)
    H, M = [], []
    for seen, trace in zip(record(vlm, samples, encode), stats.traces, strict=True):
        chosen = selector.weights(trace)[kept] > 0
        gap = (seen.states[away + 1] - seen.states[kept + 1])[torch.ones_like(chosen) if rows == "all" else chosen]
        H.append(gap.mean(0, keepdim=True) if rows == "means" else gap)
        M.append(seen.writes[kept, target])
    H, M = torch.cat(H), torch.cat(M)
    H = H - H.mean(0) if centered else H
    norms = M.norm(dim=-1)
    B = M[norms > guard * norms.median()]
    assert 0 < len(B) < len(M)
    q = torch.linalg.svd(B, full_matrices=False).Vh[0]
    V = torch.linalg.svd(H - torch.outer(H @ q, q), full_matrices=False).Vh[:3].mT

    options = {"rows": rows, "anchor": anchor, "centered": centered, "targets": (target,)}
    hidden = Activations(vlm, samples, stats, batch_size=2)
    patch = Subspace(rank=3, gain=0.5, guard=guard, **options).fit(hidden, plan)
    torch.testing.assert_close(projector(patch, kept, target).double(), 0.5 * V @ V.mT, atol=1e-4, rtol=0)
    assert patch.notes[-1].startswith(f"{target} of layer {kept} writes up to {norms.max() / norms.median():.1f} times")
    assert (projector(patch, kept, target).double() @ q).norm() < 1e-5


def test_where_no_write_is_large_the_guard_changes_nothing(lm, samples):
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    plain, guarded = (Subspace(guard=guard).fit(hidden, Plan(4, (1, 2))) for guard in (None, 1e6))
    assert torch.equal(plain.updates[0, "mlp"].left, guarded.updates[0, "mlp"].left)
    assert guarded.notes == ()
