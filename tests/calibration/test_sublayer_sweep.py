"""Losses without blocks against the loss of the rebuilt model."""

from __future__ import annotations

import pytest
import torch
from helpers.families import lvlm_of
from helpers.references import rebuilt_losses

from svl.calibration.hooks import state_hooks
from svl.calibration.layer_replay import record_replay
from svl.calibration.removal_probe import ModelProbe
from svl.calibration.sublayer_sweep import block_number, sweep_sublayers
from svl.core import Plan
from svl.pruning.surgery import apply

# Norms behind blocks, experts, cross-attention, two modules for two modalities, features added on the way.
KINDS = ("gemma3", "glm4v", "qwen3_vl_moe", "mllama", "mplug_owl2", "blip2")
BLOCKS = [(i, role) for i in range(4) for role in ("attn", "mlp")]


@pytest.mark.parametrize("removed", [(), ((1, "mlp"),), ((1, "mlp"), (2, "attn"), (2, "mlp"))])
def test_losses_are_those_of_rebuilt_models(lm, samples, removed):
    rest = [block for block in BLOCKS if block not in removed]
    base, losses = ModelProbe(lm, samples).sublayer_losses(removed, rest)
    expected, *without = rebuilt_losses(lm, samples, [removed, *((*removed, block) for block in rest)])
    assert base == pytest.approx(expected, abs=1e-5)
    assert losses == pytest.approx(dict(zip(rest, without, strict=True)), abs=1e-5)
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize("family", KINDS)
def test_states_of_families_are_those_of_rebuilt_models(family):
    lvlm, made = lvlm_of(family)
    n, start, layer = lvlm.anatomy.n_layers, lvlm.anatomy.removable[0], lvlm.anatomy.removable[-1]
    replay, _ = record_replay(lvlm, made.inputs, start)
    tried = [block_number((layer, role)) for role in ("attn", "mlp")]
    with torch.inference_mode():

        def run(i, state):
            return replay.run(lvlm.layers[i], i, state)

        rows, states = sweep_sublayers(run, lvlm.layers, lvlm.anatomy, replay.state, start, (), tried)
    assert rows == tuple(tried)
    plans = [Plan(n, ()), Plan(n, (), removed_attn=(layer,)), Plan(n, (), removed_mlp=(layer,))]
    for state, plan in zip(states, plans, strict=True):
        pruned, seen = apply(lvlm, plan), {}
        with state_hooks(pruned, [n], seen), torch.inference_mode():
            pruned.model(**made.inputs)
        torch.testing.assert_close(state[None], seen[n], atol=1e-4, rtol=1e-4)
