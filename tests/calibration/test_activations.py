"""Hidden states of dense and pruned models, layer by layer."""

from __future__ import annotations

import pytest
import torch

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.calibration.layer_replay import record_replay
from svl.core import Patch, Plan, SvlError, Update
from svl.models.sample_inputs import encode_answer
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All


def test_pruned_streams_keep_original_layer_numbers(lm, samples):
    """What is read and written in the pruned model is what hooks on it see."""
    plan = Plan(4, (1,))
    pruned = apply(lm, plan)
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    whole = Activations(pruned, samples, select(calibrate(pruned, samples), All()))
    ours = hidden.stream([0, 1, 2, 3, 4], [(2, "mlp"), (3, "attn")], plan)
    theirs = whole.stream([0, 1, 2, 3], [(1, "mlp"), (2, "attn")])
    for a, b in zip(ours, theirs, strict=True):
        for i, j in {0: 0, 1: 1, 2: 1, 3: 2, 4: 3}.items():
            assert torch.equal(a.h(i), b.h(j))
        for (i, j), role in zip(((2, 1), (3, 2)), ("mlp", "attn"), strict=True):
            assert torch.equal(a.read(i, role), b.read(j, role))
            assert torch.equal(a.wrote(i, role), b.wrote(j, role))
        after = a.h(2) + a.wrote(2, "mlp")
        assert not torch.equal(after, a.h(3))  # attention writes, too


def test_a_walk_visits_kept_layers_with_the_states_of_both_models(lm, samples):
    """Without changes, what layers give out is the pruned model's stream, and what they should is the dense one's."""
    plan = Plan(4, (2,))
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    dense = list(hidden.stream([3, 4]))
    pruned = list(hidden.stream([3, 4], [(1, "mlp"), (3, "mlp")], plan))
    seen = []
    for step in hidden.walk(plan):
        seen.append(step.layer)
        after = {1: 3, 3: 4}[step.layer]  # the dense state that the next kept layer gets
        for (x, out, wanted, w, _), d, p in zip(step.rows("mlp"), dense, pruned, strict=True):
            torch.testing.assert_close(x, p.read(step.layer, "mlp"), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out, p.h(after), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(wanted, d.h(after), atol=1e-4, rtol=1e-4)
            assert torch.equal(w, d.weights[step.layer])
    assert seen == [1, 3]


def test_a_walk_goes_on_with_what_was_changed(lm, samples):
    plan = Plan(4, (2,))
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    width = lm.layers[1].get_submodule(lm.anatomy.writers["mlp"][1].module).weight.shape
    delta = torch.randn(width, generator=torch.Generator().manual_seed(3)) / 20
    changed = list(hidden.stream([3, 4], plan=plan, patch=Patch({(1, "mlp"): Update(delta=delta)})))
    for step in hidden.walk(plan):
        if step.layer == 1:
            step.change("mlp", delta)
        after = {1: 3, 3: 4}[step.layer]
        for (_, out, _, _, _), p in zip(step.rows("mlp"), changed, strict=True):
            torch.testing.assert_close(out, p.h(after), atol=1e-4, rtol=1e-4)


def test_layers_that_cannot_run_alone_are_refused(llama, samples):
    owner = llama.model.get_submodule(llama.anatomy.layers.rpartition(".")[0])
    layer, forward = owner.layers[2], owner.layers[2].forward
    calls = []

    def moody(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs) * (1 if len(calls) % 2 else 2)

    layer.forward = moody
    try:
        with pytest.raises(SvlError, match="does more between its decoder layers"):
            record_replay(llama, encode_answer(llama, samples.samples[0])[0], 0, check=True)
    finally:
        layer.forward = forward
