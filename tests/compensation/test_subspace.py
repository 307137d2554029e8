"""Subspace compensation against the singular value decomposition that defines it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.none import NoCompensation
from svl.compensation.subspace import Subspace
from svl.core import Plan, SvlError
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All
from svl.selectors.tis import Tis
from svl.selectors.visual import Visual

SETTINGS = [
    {"rows": rows, "scope": scope, "anchor": anchor, "centered": centered}
    for rows, scope, anchor, centered in itertools.product(
        ("selected", "all", "means"), ("run", "layer"), ("before", "after"), (False, True)
    )
]
PLAN = Plan(4, (1, 2))


def hidden_states(lvlm, samples, encode) -> list[list[torch.Tensor]]:
    """h_0 .. h_L of every sample, each from a forward pass of its own: fp64 [T, d]."""
    states: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda _, args, out: states.extend([args[0], out])) for layer in lvlm.layers]
    result = []
    for sample in samples.samples:
        with torch.inference_mode():
            lvlm.model(**encode(lvlm, [sample]))
        result.append([h[0].double() for h in [*states[::2], states[-1]]])
        states.clear()
    for handle in handles:
        handle.remove()
    return result


def scp_projector(states, weights, rows, scope, anchor, centered, rank, run) -> torch.Tensor:
    """V V^T of the stacked feature gaps of one removed run, by singular value decomposition: fp64 [d, d]."""
    start, stop = run
    kept = start - 1 if anchor == "before" else stop
    whole = stop - 1 if anchor == "before" else start
    H = []
    for h, w in zip(states, weights, strict=True):
        w = w if w.ndim == 1 else w[kept]
        chosen = torch.ones(len(h[0]), dtype=torch.bool) if rows == "all" else w > 0
        for removed in [whole] if scope == "run" else range(start, stop):
            gap = (h[removed + 1] - h[kept + 1])[chosen]  # X^l = h_{l+1} is what layer l gives
            H.append(gap.mean(0, keepdim=True) if rows == "means" else gap)
    stacked = torch.cat(H)
    stacked = stacked - stacked.mean(0) if centered else stacked
    _, singular, Vh = torch.linalg.svd(stacked, full_matrices=False)
    V = Vh[:rank].mT
    return V @ V.mT, singular


@pytest.fixture(scope="module")
def unpruned(llava, qwen, samples, encode):
    """Statistics and hidden states by model."""
    return {m.name: (calibrate(m, samples), hidden_states(m, samples, encode)) for m in (llava, qwen)}


@pytest.mark.parametrize("layers", ["mean", "each"])
@pytest.mark.parametrize("chosen", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_scp_equals_the_svd_of_the_stacked_gaps(chosen, layers, vlm, samples, unpruned):
    stats, states = unpruned[vlm.name]
    stats = select(stats, selector := Tis(p=0.4, layers=layers))
    patch = Subspace(rank=2, gain=0.7, **chosen).fit(Activations(vlm, samples, stats, batch_size=2), PLAN)
    expected, singular = scp_projector(
        states, [selector.weights(t) for t in stats.traces], rank=2, run=(1, 3), **chosen
    )
    ((key, update),) = patch.updates.items()
    assert key == ({"before": 0, "after": 3}[chosen["anchor"]], "mlp")
    operator = update.left.double() @ update.right.double()
    torch.testing.assert_close(operator, 0.7 * expected, atol=1e-4, rtol=0)
    seen = torch.tensor(patch.spectra[key[0]][: len(singular)]).double()
    torch.testing.assert_close(seen, singular.double()[: len(seen)], atol=1e-2, rtol=1e-3)
    spectrum = torch.linalg.eigvalsh(torch.eye(32) + operator)
    torch.testing.assert_close(spectrum, torch.tensor([1.0] * 30 + [1.7] * 2).double(), atol=1e-5, rtol=0)


def test_every_removed_run_has_its_own_directions(llava, samples, unpruned):
    stats, states = unpruned["llava"]
    stats = select(stats, Visual())
    plan = Plan(4, (1, 3))
    patch = Subspace(rank=3, targets=("mlp", "attn")).fit(Activations(llava, samples, stats), plan)
    assert sorted(patch.updates) == [(0, "attn"), (0, "mlp"), (2, "attn"), (2, "mlp")]
    weights = [Visual().weights(t) for t in stats.traces]
    for run in plan.runs:
        expected, _ = scp_projector(states, weights, **SETTINGS[0], rank=3, run=run)
        for target in ("mlp", "attn"):
            update = patch.updates[run[0] - 1, target]
            torch.testing.assert_close(update.left.double() @ update.right.double(), expected, atol=1e-4, rtol=0)


def test_fractional_weights_weigh_rows(llava, samples):
    class Half:
        needs = frozenset()

        def weights(self, trace):
            return 0.5 * torch.ones(len(trace.visual))

    stats = calibrate(llava, samples)
    half, full = (
        Subspace(centered=True).fit(Activations(llava, samples, select(stats, s)), PLAN).updates[0, "mlp"]
        for s in (Half(), All())
    )
    torch.testing.assert_close(half.left @ half.right, full.left @ full.right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("compensation", [NoCompensation(), Subspace(rank=0)], ids=["none", "rank 0"])
def test_nothing_to_add_leaves_weights_bit_identical(compensation, lm, samples):
    stats = select(calibrate(lm, samples), All())
    patch = compensation.fit(Activations(lm, samples, stats), PLAN)
    assert not patch
    pruned, dense = apply(lm, PLAN, patch).model.state_dict(), lm.model.state_dict()
    path = lm.anatomy.layers
    assert all(t.data_ptr() == dense[n.replace(f"{path}.1.", f"{path}.3.")].data_ptr() for n, t in pruned.items())


@pytest.mark.parametrize("targets", [("mlp",), ("attn",), ("attn", "mlp")], ids=str)
@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_scp_scales_its_directions_in_the_named_targets_only(targets, gain, lm, samples):
    """(I + gain V V^T): gain 1 doubles what a projection (and its bias) writes along V, -1 removes it."""
    stats = select(calibrate(lm, samples), All())
    patch = Subspace(rank=3, gain=gain, targets=targets).fit(Activations(lm, samples, stats), PLAN)
    pruned = apply(lm, PLAN, patch)
    V = next(iter(patch.updates.values())).right.mT
    rest = torch.eye(32) - V @ V.mT
    for name, new in pruned.layers[0].named_parameters():
        old = lm.layers[0].get_parameter(name)
        if any(name.startswith(lm.anatomy.writers[t][0].module) for t in targets):
            torch.testing.assert_close(V.mT @ new, (1 + gain) * V.mT @ old, atol=1e-5, rtol=0)
            torch.testing.assert_close(rest @ new, rest @ old, atol=1e-5, rtol=0)
            assert not torch.equal(new, old)
        else:
            assert new.data_ptr() == old.data_ptr()


def test_runs_without_a_neighbour_are_noted_not_guessed(llava, samples):
    hidden = Activations(llava, samples, select(calibrate(llava, samples), All()))
    patch = Subspace().fit(hidden, Plan(4, (0, 1, 3)))
    assert sorted(patch.updates) == [(2, "mlp")]
    assert patch.notes == ("layers 0..1 have no kept layer before them: not compensated",)
    patch = Subspace(anchor="after").fit(hidden, Plan(4, (0, 1, 3)))
    assert sorted(patch.updates) == [(2, "mlp")]
    assert patch.notes == ("layers 3..3 have no kept layer after them: not compensated",)
    assert not Subspace().fit(hidden, Plan(4, ()))


def test_directions_beyond_the_rank_of_the_gaps_are_not_invented(llava, samples):
    """Two samples have two mean rows: of four wanted directions, two exist."""
    two = replace(samples, samples=samples.samples[:2])
    hidden = Activations(llava, two, select(calibrate(llava, two), All()))
    patch = Subspace(rank=4, rows="means").fit(hidden, PLAN)
    assert patch.updates[0, "mlp"].right.shape == (2, 32)
    assert patch.notes == ("the gap beside layer 0 spans only 2 of the 4 directions asked for",)


def test_compensation_errors_are_plain(llava, llama, make_samples, samples):
    text = make_samples([3], image=False)
    empty = Activations(llama, text, select(calibrate(llama, text), Visual()))
    for rows in ("selected", "means"):
        with pytest.raises(SvlError, match="leaves no token for compensation"):
            Subspace(rows=rows).fit(empty, PLAN)
    assert Subspace(rows="all").fit(empty, PLAN)
    hidden = Activations(llava, samples, select(calibrate(llava, samples), All()))
    with pytest.raises(SvlError, match="rank is 33, but the model is only 32 wide"):
        Subspace(rank=33).fit(hidden, PLAN)
    partial = replace(llava, anatomy=replace(llava.anatomy, writers={"mlp": llava.anatomy.writers["mlp"]}))
    with pytest.raises(SvlError, match="targets for this model is 'attn'"):
        Subspace(targets=("attn",)).fit(replace(hidden, lvlm=partial), PLAN)
    for wrong in ({"rank": -1}, {"rows": "none"}, {"anchor": "both"}, {"scope": "all"}, {"targets": ("qkv",)}):
        with pytest.raises(SvlError, match=f"compensation.{next(iter(wrong))}"):
            Subspace(**wrong)


def test_hidden_states_that_overflow_are_named(llava, samples):
    stats = select(calibrate(llava, samples), All())
    handle = llava.layers[2].register_forward_hook(lambda _, __, out: out * float("inf"))
    with pytest.raises(SvlError, match=r"not finite.*model\.dtype"):
        Subspace().fit(Activations(llava, samples, stats), PLAN)
    handle.remove()
