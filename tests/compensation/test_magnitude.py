"""Magnitude compensation: its factor, and its fold behind the gap against the paper's fold before it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.families import FAMILIES, POST_NORM, SUPPORTED, lvlm_of
from helpers.references import close, logits
from helpers.streams import GivenSample, GivenStates, record
from torch import Tensor

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.magnitude import Magnitude
from svl.core import Patch, Plan, SvlError, Update, checked_patch
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.pruning import folding
from svl.pruning.patch_file import load_patch, save_patch
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All
from svl.selectors.visual import Visual


def scales(patch: Patch) -> dict[int, float]:
    """The factor of what each layer writes, which must be the same for attention and MLP."""
    found = {layer: update.scale for (layer, role), update in patch.updates.items() if role == "attn"}
    assert patch.updates.keys() == {(layer, role) for layer in found for role in ("attn", "mlp")}
    assert all(patch.updates[layer, "mlp"] == Update(scale=scale) for layer, scale in found.items())
    return found


def test_factors_by_hand():
    """Channel means of |h| go from (1, 2) to (2, 2), by 3 / 2, and from (2, 4) to (8, 4), by 5 / 2: by 2 on average."""
    first = GivenSample({1: Tensor([[1, 1], [-1, 3]]), 2: Tensor([[-3, 2], [1, 2]])}, {}, torch.ones(4, 2))
    second = GivenSample({1: Tensor([[2, 4]]), 2: Tensor([[-8, 4]])}, {}, torch.ones(4, 1))
    patch = Magnitude().fit(GivenStates(4, [first, second]), Plan(4, (1,)))
    assert scales(patch) == {2: 0.5, 3: 0.5}
    assert patch.notes == ("layers 1..1: alpha 2.0000",)


def test_selected_tokens_alone_count_if_asked_to():
    weights = Tensor([[0.0, 1.0], [0.5, 0.0], [1.0, 0.0], [1.0, 1.0]])  # those of layer 1 count
    states = {1: Tensor([[1, 2], [5, 5]]), 2: Tensor([[4, 2], [7, 9]])}
    unselected = GivenSample(states, {}, torch.zeros(4, 2))
    hidden = GivenStates(4, [GivenSample(states, {}, weights), unselected])
    assert scales(Magnitude("selected").fit(hidden, Plan(4, (1,)))) == {2: 0.4, 3: 0.4}  # (4 / 1 + 2 / 2) / 2 = 2.5
    with pytest.raises(SvlError, match="leaves no token for compensation"):
        Magnitude("selected").fit(GivenStates(4, [unselected]), Plan(4, (1,)))


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (0.0, 0.0), (1.0, float("nan")), (1.0, 0.0)])
def test_factors_that_are_none_are_errors(before, after):
    states = {1: torch.full((2, 1), before), 2: torch.full((2, 1), after)}
    hidden = GivenStates(3, [GivenSample(states, {}, torch.ones(3, 2))])
    with pytest.raises(SvlError, match=r"across layers 1\.\.1, the stream grows by a factor of"):
        Magnitude().fit(hidden, Plan(3, (1,)))


def test_factors_of_several_gaps_multiply(lm, samples, encode):
    """Against states of single forward passes: no batches, no padding, no weights."""
    plan = Plan(4, (0, 2))
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()), batch_size=2)
    seen = record(lm, samples, encode)

    def alpha(start: int, stop: int) -> float:
        ratios = [s.states[stop].abs().mean(0) / s.states[start].abs().mean(0) for s in seen]
        return float(torch.stack(ratios).mean(0).mean())

    found = scales(Magnitude().fit(hidden, plan))
    assert found == pytest.approx({1: 1 / alpha(0, 1), 3: 1 / alpha(0, 1) / alpha(2, 3)}, rel=1e-4)


def test_a_run_at_the_end_needs_no_factor(llava, samples):
    hidden = Activations(llava, samples, select(calibrate(llava, samples), Visual()))
    patch = Magnitude().fit(hidden, Plan(4, (3,)))
    assert not patch
    assert patch.notes == ("no layer behind the last one: its run needs no factor",)
    assert list(scales(Magnitude().fit(hidden, Plan(4, (1, 3))))) == [2]
    assert not Magnitude().fit(hidden, Plan(4, ()))


@pytest.mark.parametrize("removed", [(1,), (0, 2), (1, 2)], ids=str)
def test_the_fold_behind_gaps_computes_what_the_papers_fold_before_them_does(removed, lm, samples, encode):
    """The paper multiplies by alpha what enters the first layer and what every layer before the gap writes."""
    plan, alphas = Plan(4, removed), {}
    for n, (_, stop) in enumerate(plan.runs):
        alphas[stop] = (1.4, 0.8)[n]
    patch = {}
    for layer in plan.kept:
        factor = 1.0
        for stop, alpha in alphas.items():
            factor /= alpha if stop <= layer else 1.0
        patch |= {(layer, role): Update(scale=factor) for role in ("attn", "mlp")}
    ours = apply(lm, plan, Patch(patch))

    pruned = apply(lm, plan)
    paper = replace(pruned, model=copy.deepcopy(pruned.model))
    entering = 1.0
    for stop, alpha in alphas.items():
        entering *= alpha
        for layer, original in zip(paper.layers, plan.kept, strict=True):
            if original < stop:
                for name, parameter in layer.named_parameters():
                    if "o_proj" in name or "down_proj" in name:
                        parameter.mul_(alpha)

    def enlarge(_, args, kwargs):
        if args:
            return (args[0] * entering, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * entering}

    paper.layers[0].register_forward_pre_hook(enlarge, with_kwargs=True)
    inputs = encode(lm, samples)
    expected = logits(paper.model, inputs)
    close(logits(ours.model, inputs), expected, 2e-5)  # the norms' epsilon, and rounding
    assert (logits(pruned.model, inputs) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name not in POST_NORM])
def test_scaled_writers_are_all_that_enters_the_stream_behind_a_gap(family):
    """Experts, convolutions, cross-attention, parallel blocks: against the dense model, its stream grown at the gap."""
    lvlm, made = lvlm_of(family)
    free = lvlm.anatomy.removable
    gone, alpha = free[len(free) // 2], 1.5
    plan = Plan(lvlm.anatomy.n_layers, (gone,))
    patch = Patch({(i, role): Update(scale=1 / alpha) for i in plan.kept if i > gone for role in lvlm.anatomy.writers})

    def grow(_, args, kwargs, out):
        state = alpha * (args[0] if args else kwargs["hidden_states"])
        return (state, *out[1:]) if isinstance(out, tuple) else state

    handle = lvlm.layers[gone].register_forward_hook(grow, with_kwargs=True)
    expected = logits(lvlm.model, made.inputs)
    handle.remove()
    close(logits(apply(lvlm, plan, patch).model, made.inputs), expected, 1e-4)


def test_visual_features_that_enter_behind_a_gap_are_refused():
    made = FAMILIES["qwen3_vl"]()
    lvlm = Lvlm(made.model, None, find_anatomy(made.model, image_token=made.image_token_id, protect="none"), "qwen3_vl")
    n = lvlm.anatomy.n_layers
    late = Patch({(i, role): Update(scale=0.5) for i in range(3, n) for role in ("attn", "mlp")})
    with pytest.raises(SvlError, match=r"without layers \[0\], which model\.protect does not spare, .*DeepStack"):
        apply(lvlm, Plan(n, (0,)), Patch({(1, "mlp"): Update(scale=0.5)}))
    assert apply(lvlm, Plan(n, (2,)), late)


# ------------------------------------------------------------------------------------------ scale in a patch


def test_a_scale_comes_last_and_reaches_biases():
    chance = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 48, generator=chance), torch.randn(32, generator=chance)
    left, right = torch.randn(32, 2, generator=chance), torch.randn(2, 32, generator=chance)
    delta, shift = torch.randn(32, 48, generator=chance), torch.randn(32, generator=chance)
    update = Update(left, right, delta, shift, scale=0.3)
    operator = torch.eye(32) + left @ right
    torch.testing.assert_close(folding.fold_update(weight, update), 0.3 * (operator @ weight + delta))
    torch.testing.assert_close(folding.fold_update(bias, update), 0.3 * (operator @ bias + shift))
    for dtype in (torch.bfloat16, torch.float16):
        alone = folding.fold_update(weight.to(dtype), Update(scale=0.3))
        assert torch.equal(alone, (weight.to(dtype).float() * 0.3).to(dtype))


def test_scales_survive_their_file_to_the_last_bit(tmp_path):
    left = torch.randn(4, 4)
    patch = Patch({(11, "mlp"): Update(left=left, scale=1 / 3), (2, "attn"): Update(scale=0.1 + 0.2)})
    save_patch(patch, tmp_path / "patch.safetensors")
    again = load_patch(tmp_path / "patch.safetensors").updates
    assert again[2, "attn"] == Update(scale=0.1 + 0.2)
    assert again[11, "mlp"].scale == 1 / 3
    assert torch.equal(again[11, "mlp"].left, left)


def test_a_scale_that_is_not_finite_is_no_patch():
    patch = Patch({(0, "mlp"): Update(scale=float("inf"))})
    with pytest.raises(SvlError, match="gives a change of 'mlp' of layer 0 that is not finite"):
        checked_patch(Magnitude(), patch, Plan(3, (1,)))
