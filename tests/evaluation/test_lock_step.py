"""Models that answer in lock-step answer as they do alone, in every family, and run shared layers once."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers.families import ORDINARY, every, lvlm_of
from helpers.references import logits
from helpers.tasks import DEMO, TASKS
from torch import nn
from transformers import GenerationConfig

import svl
from svl.core import Patch, Plan, SvlError, Update
from svl.evaluation.lock_step import LockStep
from svl.evaluation.settings import TaskOptions
from svl.evaluation.shared_prefill import SharedPrefill
from svl.pruning.surgery import apply

REFUSED = {
    "gemma4": "differ in more than their layers",  # which have slices of one table
    "lfm2_vl": "keep more than keys and values",
    "qwen3_5": "keep more than keys and values",
}


def settings(n=8, ends=(5, 9, 13, 17, 21, 25, 29), suppressed=ORDINARY):
    """Greedy; many tokens end an answer, so that lengths differ."""
    words = {"suppress_tokens": list(suppressed), "eos_token_id": list(ends) or None, "pad_token_id": 0}
    return GenerationConfig(max_new_tokens=n, do_sample=False, **words)


def relatives(lvlm):
    """Plans and models: dense, four pruned ones, and one of these with other weights in its last layer."""
    n, free = lvlm.anatomy.n_layers, lvlm.anatomy.removable
    removed = [(), free[-1:], free[:1], tuple({free[0], free[-1]}), free[1:3], free[-1:]]
    plans = [Plan(n, r) for r in removed]
    models = [lvlm, *(apply(lvlm, plan) for plan in plans[1:])]
    last = models[-1].layers[-1]
    last.load_state_dict({k: v * 1.5 for k, v in last.state_dict().items()}, assign=True)
    return models, plans


def check(dense, models, plans, inputs, chosen):
    """Answers in lock-step are those alone; returns them."""
    alone = [m.model.generate(**inputs, generation_config=chosen) for m in models]
    found = LockStep(dense, models, plans).generate(inputs, chosen)
    for expected, tokens in zip(alone, found, strict=True):
        assert torch.equal(tokens, expected)
    return found


@every
def test_answers_in_lock_step_are_those_alone(family):
    lvlm, made = lvlm_of(family)
    models, plans = relatives(lvlm)
    if family in REFUSED:
        with pytest.raises(SvlError, match=REFUSED[family]):
            LockStep(lvlm, models, plans).generate(made.inputs, settings())
        return
    check(lvlm, models, plans, made.inputs, settings(5))
    for k, found in LockStep(lvlm, models, plans).logits(made.inputs, last=3):
        torch.testing.assert_close(found, logits(models[k].model, made.inputs)[:, -3:], atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llava", "qwen", "internvl", "llama"])
def test_padded_batches_whose_answers_end_at_different_times(kind, request, samples, encode):
    lvlm = request.getfixturevalue(kind)
    plans = [Plan(4, removed) for removed in ((0,), (0, 1), (2,), (3,), (1, 3))]  # no model keeps all layers
    models = [apply(lvlm, plan) for plan in plans]
    inputs = encode(lvlm, samples.samples)
    assert (inputs["attention_mask"] == 0).any()
    prompt = inputs["input_ids"].shape[1]
    said = torch.cat(check(lvlm, models, plans, inputs, settings(30, (), range(8))))[:, prompt:].tolist()
    words = sorted({word for row in said for word in row})
    first = {word: [row.index(word) if word in row else 30 for row in said] for word in words}
    end = next(word for word, at in first.items() if min(at) < 7 and max(at) > 8)  # some leave long before others
    check(lvlm, models, plans, inputs, settings(30, [end], range(8)))


def test_patched_layers_are_run_for_their_models_only(llava, samples, encode):
    update = Update(0.2 * torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    plans = [Plan(4, (2,)), Plan(4, (2,)), Plan(4, (2,)), Plan(4, (1, 2))]
    patches = [None, Patch({(3, "mlp"): update}), Patch({(0, "attn"): update, (3, "mlp"): update}), None]
    models = [apply(llava, plan, patch) for plan, patch in zip(plans, patches, strict=True)]
    found = check(llava, models, plans, encode(llava, samples.samples), settings(12, (), range(8)))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_maps_at_cuts_and_missing_blocks_are_the_models_own(llava, samples, encode):
    """Maps are applied by hooks of the layers beside a cut; a block that is left out fills no cache."""
    turn = torch.eye(llava.anatomy.hidden_size).roll(1, 0)
    plans = [
        Plan(4, ()),
        Plan(4, (1,)),
        Plan(4, (1,)),
        Plan(4, (2, 3)),
        Plan(4, (), removed_attn=(2,)),
        Plan(4, (1,), removed_attn=(3,), removed_mlp=(2,)),
    ]
    patches = [None, Patch(maps={1: turn}), None, Patch(maps={2: turn}), None, None]
    models = [apply(llava, plan, patch) for plan, patch in zip(plans, patches, strict=True)]
    check(llava, models, plans, encode(llava, samples.samples[:3]), settings())


@contextmanager
def rows_through_layers(*lvlms):
    """Of each call of a decoder layer's MLP, within the block: where its weights are, and its rows and tokens."""
    weights = {p.data_ptr() for lvlm in lvlms for name, p in lvlm.layers.named_parameters() if "down_proj" in name}
    calls = []

    def note(module, args, output):
        weight = getattr(getattr(module, "down_proj", None), "weight", None)
        if weight is not None and weight.data_ptr() in weights:
            calls.append((weight.data_ptr(), len(output), output.shape[1]))

    handle = nn.modules.module.register_module_forward_hook(note)
    yield calls
    handle.remove()


def test_layers_that_several_models_keep_run_once(llava, samples, encode):
    plans = [Plan(4, removed) for removed in ((), (1,), (3,), (1, 3), (2,))]
    models = [apply(llava, plan) for plan in plans]
    inputs = encode(llava, samples.samples[:2])
    lock_step, shared = LockStep(llava, models, plans), SharedPrefill(models)
    chosen = settings(6, (), range(8))
    with rows_through_layers(llava) as calls:
        lock_step.generate(inputs, chosen)
    with rows_through_layers(llava) as calls_sharing:
        shared.generate(inputs, chosen)
    prompt = inputs["input_ids"].shape[1]
    at = {layer.mlp.down_proj.weight.data_ptr(): i for i, layer in enumerate(llava.layers)}
    in_prompt = [(at[where], rows) for where, rows, tokens in calls if tokens == prompt]
    # of five models, 1 has had: 0, 01 or 0 at layer 2; 012, 02 or 01 at layer 3; two rows each
    assert in_prompt == [(0, 2), (1, 2), (2, 4), (3, 6)]
    decoded = [(at[where], rows) for where, rows, tokens in calls if tokens == 1]
    assert decoded == [(0, 10), (1, 6), (2, 8), (3, 6)] * 5
    assert sum(rows for _, rows in in_prompt) <= sum(rows for _, rows, tokens in calls_sharing if tokens == prompt)
    assert sum(tokens == 1 for *_, tokens in calls_sharing) == 5 * (4 + 3 + 3 + 2 + 3)


def test_rows_that_have_ended_are_no_longer_computed(llama):
    plans = [Plan(4, removed) for removed in ((), (1,), (2,))]
    models = [apply(llama, plan) for plan in plans]
    inputs = {"input_ids": torch.tensor([[9, 10, 11, 12]]).repeat(2, 1)}
    inputs["input_ids"][1, 1:] += 5
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    free = check(llama, models, plans, inputs, settings(40, (), range(8)))
    ends = free[0][:, 5].tolist()  # the dense model ends early
    with rows_through_layers(llama) as calls:
        check(llama, models, plans, inputs, settings(40, ends, range(8)))
    assert calls[-1][1] < 6


def test_tower_runs_once_for_all(llava, samples, encode):
    plans = [Plan(4, removed) for removed in ((), (1,), (2,))]
    lock_step = LockStep(llava, [apply(llava, plan) for plan in plans], plans)
    inputs = encode(llava, samples.samples)
    rows = []

    def note(module, args, output):
        if type(module).__name__ == "CLIPEncoderLayer":
            rows.append(len(args[0]))

    lock_step.generate(inputs, settings(2))  # when it finds out how outputs grow
    handle = nn.modules.module.register_module_forward_hook(note)
    lock_step.generate(inputs, settings(2))
    handle.remove()
    assert set(rows) == {len(samples.samples)}


def test_nothing_is_left_behind(llava, samples, encode):
    plans = [Plan(4, ()), Plan(4, (3,))]
    models = [llava, apply(llava, plans[1])]
    inputs, other = (encode(llava, samples.samples[i : i + 2]) for i in (0, 2))
    before = [logits(m.model, other) for m in models]
    lock_step = LockStep(llava, models, plans)
    with pytest.raises(TypeError):
        lock_step.generate({**inputs, "pixel_values": None}, settings())
    check(llava, models, plans, other, settings())
    for (tokens, again), model in zip(
        zip(*(lock_step.generate(i, settings()) for i in (inputs, inputs)), strict=True), models, strict=True
    ):
        assert torch.equal(tokens, again)
        assert not any("forward" in vars(module) for module in model.model.modules())
    for model, expected in zip(models, before, strict=True):
        assert torch.equal(logits(model.model, other), expected)


def test_models_that_differ_elsewhere_are_refused(llama, llava):
    plan = Plan(4, (1,))
    other = apply(llama, plan)
    other.model.lm_head.weight = nn.Parameter(other.model.lm_head.weight.clone(), requires_grad=False)
    with pytest.raises(SvlError, match="differ in more than their layers"):
        LockStep(llama, [other], [plan])
    with pytest.raises(SvlError, match="has 3 layers, but its plan keeps 2"):
        LockStep(llama, [apply(llama, plan)], [Plan(4, (1, 2))])
    with pytest.raises(SvlError, match="differ in more than their layers"):
        LockStep(llava, [apply(llama, plan)], [plan])


@pytest.fixture(scope="module")
def demo():
    return svl.load(DEMO / "demo_lvlm", device="cpu")


@pytest.mark.parametrize("possible", [True, False])
def test_scores_of_a_sweep_are_made_in_lock_step_where_it_pays(possible, demo, tmp_path, monkeypatch, caplog):
    pytest.importorskip("lmms_eval")
    from svl.run import shared_scores

    task, plans = "svl_demo_open", [Plan(16, ()), Plan(16, (4, 9)), Plan(16, (0, 12, 13))]
    models = [apply(demo, plan) for plan in plans]
    if not possible:
        models[1].model.lm_head.weight = nn.Parameter(models[1].model.lm_head.weight.clone(), requires_grad=False)
    options = TaskOptions("accuracy", limit=4, batch_size=3, include_path=TASKS)
    setup = SimpleNamespace(tasks={task: options})
    variants = [SimpleNamespace(setup=setup, lvlm=m, plan=p) for m, p in zip(models, plans, strict=True)]
    rows = {}
    for pays in (True, False):
        monkeypatch.setattr(shared_scores, "waits_for_weights", lambda device, pays=pays: pays)
        folders = [tmp_path / f"{pays}{k}" for k in range(3)]
        for folder in folders:
            folder.mkdir()
        scores = shared_scores.evaluate_models(demo, variants, task, folders)
        rows[pays] = [(folder / "samples.jsonl").read_text() for folder in folders], [s["metrics"] for s in scores]
    assert rows[True] == rows[False]
    said = [record.getMessage() for record in caplog.records if "not in lock-step" in record.getMessage()]
    assert len(said) == (0 if possible else 1)


def test_only_accelerators_wait_for_weights():
    from svl.run.shared_scores import waits_for_weights

    assert not waits_for_weights(torch.device("cpu"))
    assert waits_for_weights(torch.device("cuda", 0))
