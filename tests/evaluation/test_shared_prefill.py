"""Models that share what they have in common answer as they do alone, in every family."""

from __future__ import annotations

import pytest
import torch
from helpers.families import every, generate, lvlm_of
from helpers.references import logits, together

from svl.core import Patch, Plan, SvlError, Update
from svl.evaluation.shared_prefill import SharedPrefill
from svl.pruning.surgery import apply


def relatives(lvlm):
    """The dense model, three pruned ones, and one of these with other weights in its last layer."""
    n, free = lvlm.anatomy.n_layers, lvlm.anatomy.removable
    models = [apply(lvlm, Plan(n, r)) for r in (free[-1:], free[:1], tuple({free[0], free[-1]}))]
    changed = apply(lvlm, Plan(n, free[-1:]))
    last = changed.layers[-1]
    last.load_state_dict({k: v * 1.5 for k, v in last.state_dict().items()}, assign=True)
    return [lvlm, *models, changed]


@every
def test_answers_together_are_those_alone(family):
    lvlm, made = lvlm_of(family)
    models = relatives(lvlm)
    if family == "gemma4":  # keys and values of some layers go to later ones past the cache
        with pytest.raises(SvlError, match="leave more behind"):
            together(models, lambda model: generate(model, made.inputs))
        return
    alone = [generate(m.model, made.inputs) for m in models]
    (found, shared) = together(models, lambda model: generate(model, made.inputs))
    for (words, numbers), (ours, same) in zip(alone, found, strict=True):
        assert torch.equal(words, ours)
        assert torch.equal(numbers, same)
    assert 0 < shared.layers_saved < shared.layers_passed
    once, _ = together(models, lambda model: logits(model, made.inputs))
    assert all(torch.equal(a, logits(m.model, made.inputs)) for a, m in zip(once, models, strict=True))


def test_as_many_layers_are_saved_as_stacks_have_in_common(llama):
    n = llama.anatomy.n_layers
    models = [apply(llama, Plan(n, (i,))) for i in (3, 1, 2)] + [llama]
    inputs = {"input_ids": torch.tensor([[4, 5, 6]])}
    _, shared = together(models, lambda model: logits(model, inputs))
    # in the order of the alphabet: 0123, 012, 013, 023: each has in common with the one before 3, 2, 1
    assert (shared.layers_saved, shared.layers_passed) == (6, 13)


def test_changed_weights_are_not_shared(llama):
    n = llama.anatomy.n_layers
    update = Update(0.1 * torch.eye(32, dtype=torch.float64))
    patched = apply(llama, Plan(n, (3,)), Patch({(0, "mlp"): update}))
    _, shared = together([llama, patched], lambda model: logits(model, {"input_ids": torch.tensor([[4, 5]])}))
    assert shared.layers_saved == 0


def test_tower_runs_once_for_all(llava, samples, encode):
    calls = []
    models = [apply(llava, Plan(4, r)) for r in ((), (1,), (2,))]
    handles = [m.model.model.vision_tower.encoder.register_forward_hook(lambda *_: calls.append(1)) for m in models]
    inputs = encode(llava, samples.samples)
    shared = SharedPrefill(models)
    for batches in (1, 2):
        shared.start_batch()
        for k in shared.order:
            with shared.reading(k):
                logits(models[k].model, inputs)
        assert len(calls) == batches
    for handle in handles:
        handle.remove()


def test_nothing_is_left_behind(llava, samples, encode):
    inputs, other = (encode(llava, samples.samples[i : i + 2]) for i in (0, 2))
    models = [llava, apply(llava, Plan(4, (3,)))]
    before = [logits(m.model, other) for m in models]
    shared = SharedPrefill(models)

    def ask(k):
        with shared.reading(k):
            if k == shared.order[-1]:
                raise RuntimeError("stop")
            logits(models[k].model, inputs)

    ask(shared.order[0])
    with pytest.raises(RuntimeError, match="stop"):
        ask(shared.order[1])
    for model, expected in zip(models, before, strict=True):
        assert not any("forward" in vars(module) for module in model.model.modules())
        assert torch.equal(logits(model.model, other), expected)
