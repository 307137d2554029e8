"""What training changes, what it leaves alone, what it minimises, and how it goes on after it was interrupted."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers.exports import rewrite_tensors
from helpers.families import lvlm_of
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from svl.checkpoints import export
from svl.core import Patch, Plan, SvlError, Update
from svl.data.samples import Samples
from svl.models.lvlm import Lvlm
from svl.models.weight_files import WEIGHTS
from svl.pruning import surgery
from svl.recovery.base import Parts, Recovery
from svl.recovery.batches import ANSWER, Batches, TrainingOrder, samples_to_check
from svl.recovery.checkpoints import CHECKPOINT_FILES
from svl.recovery.distill import Distill
from svl.recovery.interlace import Interlace
from svl.recovery.lora import Lora
from svl.recovery.projector import Projector
from svl.recovery.student import Student, check_trainable
from svl.recovery.training import recover
from svl.run.messages import one_line

pytest.importorskip("peft")

PLAN = Plan(4, (1,))
FAST = {"learning_rate": 0.05, "batch_size": 2, "schedule": "constant"}
UPDATE = Update(torch.eye(32)[:, :2] / 4, torch.eye(32)[:2] / 4)


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


def values_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(student: Student, batch) -> None:
    """One plain gradient step on what is trained."""
    student(**batch)["loss"].backward()
    with torch.no_grad():
        for p in student.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None


# ------------------------------------------------------------------------------------------ what is changed


@pytest.mark.parametrize("recovery", [Distill(**FAST, logits=1.0), Lora(**FAST, layers="gaps")], ids=lambda r: r.layers)
def test_merged_weights_compute_what_the_adapters_do(recovery, lm, samples, encode):
    """LoRA in training, beside weights that a compensation has changed, and merged into them: 1e-5 in fp32."""
    patch = Patch({(2, "mlp"): UPDATE})
    student = Student(lm, PLAN, patch, recovery)
    batch = Batches(student.lvlm, samples)([0, 1, 2])
    for _ in range(3):
        step(student, batch)
    inputs = encode(lm, samples.samples)
    unmerged = logits_of(student.model.eval(), inputs)
    merged = surgery.apply(lm, PLAN, Patch(patch.updates, trained=student.changes()))
    torch.testing.assert_close(logits_of(merged.model, inputs), unmerged, atol=1e-5, rtol=1e-5)
    before = logits_of(surgery.apply(lm, PLAN, patch).model, inputs)
    assert (unmerged - before).abs().max() > 1e-3
    assert not [name for name, _ in merged.model.named_modules() if "lora" in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recovery", [Lora(), Projector(), Interlace(), Distill()], ids=lambda r: type(r).__name__)
def test_no_training_changes_nothing_bit_for_bit(recovery, dtype, llava, samples, encode, tmp_path):
    lvlm = replace(llava, model=copy.deepcopy(llava.model).to(getattr(torch, dtype)))
    inputs, before = encode(lvlm, samples.samples), surgery.apply(lvlm, PLAN)
    untrained = Student(lvlm, PLAN, None, recovery).changes()
    assert untrained
    after = surgery.apply(lvlm, PLAN, Patch(trained=untrained))
    assert torch.equal(logits_of(after.model, inputs), logits_of(before.model, inputs))
    for (name, p), (_, old) in zip(after.model.named_parameters(), before.model.named_parameters(), strict=True):
        assert torch.equal(p, old), name
    none = type(recovery)(steps=0)
    assert recover(lvlm, PLAN, None, samples, none, tmp_path).trained == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recovery", "named"),
    [
        (Projector(**FAST), ["multi_modal_projector"]),
        (Lora(**FAST, layers="gaps", targets="attn"), ["layers.0.self_attn", "layers.2.self_attn"]),
        (Lora(**FAST, layers="kept", targets="mlp"), ["layers.0.mlp", "layers.2.mlp", "layers.3.mlp"]),
        (Distill(**FAST, targets="mlp"), ["multi_modal_projector", *(f"layers.{i}.mlp" for i in (0, 2, 3))]),
        (Interlace(**FAST), ["layers.2."]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Recovery) else "",
)
def test_gradients_reach_what_is_named_and_nothing_else(recovery, named, llava, samples):
    dense = values_of(llava.model)
    student = Student(llava, PLAN, None, recovery)
    student(**Batches(student.lvlm, samples)([0, 1]))["loss"].backward()
    changed = student.changes()
    for part in named:
        assert any(part in name for name in changed), part
    assert all(any(part in name for part in named) for name in changed)
    wanted = set(student.state_dict())
    found = {name for name, p in student.model.named_parameters() if p.grad is not None}
    assert found == wanted
    shared = {p.data_ptr(): name for name, p in llava.model.named_parameters()}
    frozen = [name for name, p in student.model.named_parameters() if p.data_ptr() in shared]
    assert len(frozen) + len(wanted) == len(list(student.model.named_parameters()))  # the rest is the dense model's own
    step(student, Batches(student.lvlm, samples)([2, 3]))
    for name, p in llava.model.named_parameters():
        assert torch.equal(p, dense[name]), name
        assert p.grad is None


def test_training_goes_down_and_only_named_tensors_change(llava, samples, tmp_path):
    found = recover(llava, PLAN, None, samples, Interlace(steps=12, **{**FAST, "learning_rate": 3e-3}), tmp_path)
    curve = [point["loss"] for point in found.spent.curve]
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])
    pruned = surgery.apply(llava, PLAN, Patch(trained=found.trained)).model
    before = surgery.apply(llava, PLAN).model
    changed = {
        name
        for (name, p), (_, old) in zip(pruned.named_parameters(), before.named_parameters(), strict=True)
        if not torch.equal(p, old)
    }
    assert changed
    assert all(name.startswith("model.language_model.layers.1.") for name in changed)  # the dense model's layer 2
    assert {name.replace("layers.2.", "layers.1.") for name in found.trained} >= changed


# ---------------------------------------------------------------------------------------------------- losses


def reference_terms(dense, pruned, plan, examples, temperature) -> dict[str, float]:
    """The losses of samples one by one, from hidden states and logits of plain forward passes."""
    answers, divergences, tokens = 0.0, 0.0, 0
    states: dict[int, list[float]] = {}
    for sample in examples:
        turns = sample.conversation(pictured=dense.takes_images)
        full = sample.conversation(pictured=dense.takes_images, answered=True)
        pictures = [sample.pictures] if dense.takes_images else None
        asked_tokens = dense.encode([dense.render(turns)], pictures)["input_ids"][0].tolist()
        inputs = dense.encode([dense.render(full).rstrip() + dense.tokenizer.eos_token], pictures)
        both = zip(asked_tokens, inputs["input_ids"][0].tolist(), strict=False)
        asked = next(i for i, (a, b) in enumerate(both) if a != b)
        outputs, seen = [], []
        for lvlm in (dense, pruned):
            entering = []
            handles = [
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, entering=entering: entering.append(
                        args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                )
                for layer in lvlm.layers
            ]
            handles.append(
                lvlm.layers[-1].register_forward_hook(
                    lambda _, args, out, entering=entering: entering.append(out[0] if isinstance(out, tuple) else out)
                )
            )
            with torch.no_grad():
                outputs.append(lvlm.model(**inputs, use_cache=False).logits[0].double())
            for handle in handles:
                handle.remove()
            seen.append(entering)
        theirs, ours = (logits[asked - 1 : -1] for logits in outputs)
        target = inputs["input_ids"][0, asked:]
        answers += float(F.cross_entropy(ours, target, reduction="sum"))
        p = (theirs / temperature).softmax(-1)
        log_q = (ours / temperature).log_softmax(-1)
        divergences += float((p * (p.log() - log_q)).sum()) * temperature**2
        tokens += len(target)
        for old in [i for i in plan.kept if i > plan.removed[0]] + [plan.n_layers]:
            new = plan.kept.index(old) if old < plan.n_layers else len(plan.kept)
            h, g = seen[0][old][0].double(), seen[1][new][0].double()
            states.setdefault(old, []).extend(((g - h).square().sum(-1) / h.square().sum(-1)).tolist())
    mean = [sum(values) / len(values) for values in states.values()]
    return {"answers": answers / tokens, "logits": divergences / tokens, "states": sum(mean) / len(mean)}


def test_losses_are_those_of_plain_forward_passes(lm, samples):
    """Batches are padded; the reference has one sample at a time."""
    student = Student(lm, Plan(4, (1, 2)), None, Distill(answers=0.5, logits=0.25, states=2.0, temperature=2.0))
    batch = Batches(student.lvlm, samples)(range(5))
    loss = student(**batch)["loss"]
    expected = reference_terms(lm, surgery.apply(lm, Plan(4, (1, 2))), Plan(4, (1, 2)), samples.samples, 2.0)
    assert student.take_terms() == pytest.approx(expected, rel=1e-4)
    total = 0.5 * expected["answers"] + 0.25 * expected["logits"] + 2.0 * expected["states"]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)


def test_the_teacher_is_the_dense_model(lm, samples, encode):
    """A student without anything removed agrees with its teacher exactly; training it leaves the teacher alone."""
    inputs = encode(lm, samples.samples)
    before = logits_of(lm.model, inputs)
    student = Student(lm, Plan(4, ()), None, Distill(logits=1.0))
    batch = Batches(student.lvlm, samples)([0, 1, 2])
    student(**batch)
    newest = student.take_terms()
    assert newest["logits"] == pytest.approx(0, abs=1e-6)
    assert newest["states"] == 0
    for _ in range(2):
        step(student, batch)
    assert torch.equal(logits_of(lm.model, inputs), before)


def test_running_statistics_of_the_dense_model_stay_as_they_are():
    """A vision tower with batch norms, whose buffers pruned and dense model share."""
    lvlm, made = lvlm_of("fast_vlm")
    before = {name: value.clone() for name, value in lvlm.model.state_dict().items()}
    student = Student(lvlm, Plan(lvlm.anatomy.n_layers, (1,)), None, Lora(rank=2)).train()
    answer = torch.zeros_like(made.inputs["input_ids"], dtype=torch.bool)
    answer[:, -3:] = True
    step(student, {"groups": [{**made.inputs, ANSWER: answer}]})
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in lvlm.model.state_dict().items())


def test_a_tied_tensor_is_trained_under_all_its_names(llama, samples):
    """The embedding of a model whose head is the same matrix: what is applied is what was trained."""
    model = copy.deepcopy(llama.model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tied = replace(llama, model=model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for path in ("model.embed_tokens", "lm_head"):
        student = Student(tied, PLAN, None, Projector(modules=(path,)))
        (trained,) = student.trained.values()
        assert student.model.lm_head.weight is trained
        assert student.model.model.embed_tokens.weight is trained
        with torch.no_grad():
            trained += 0.5
        applied = surgery.apply(tied, PLAN, Patch(trained=student.changes())).model
        assert torch.equal(applied.lm_head.weight, trained)
        assert applied.model.embed_tokens.weight is applied.lm_head.weight


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_tensor_that_was_trained_is_exported_whatever_name_it_has_on_disk(stored, llama, tmp_path):
    model = copy.deepcopy(llama.model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "source")
    names = ("lm_head.weight", "model.embed_tokens.weight")
    (kept,) = (t for name, t in load_file(tmp_path / "source" / WEIGHTS).items() if name in names)
    rewrite_tensors(
        tmp_path / "source",
        lambda tensors: (
            {k: v for k, v in tensors.items() if k not in names}
            | {name: kept.clone() for name in names if stored in (name, "both")}
        ),
    )
    student = Student(replace(llama, model=model), PLAN, None, Projector(modules=("lm_head",)))
    with torch.no_grad():
        student.trained["lm_head.weight"] += 0.5
    export.save(tmp_path / "source", PLAN, tmp_path / "out", Patch(trained=student.changes()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, kept + 0.5)
    assert torch.equal(again.model.embed_tokens.weight, kept + 0.5)


@pytest.mark.parametrize("family", ["blip2", "instructblip"])
def test_a_model_in_bfloat16_whose_first_parameter_is_trained(family):
    """It is float32 from then on, which says nothing of all others."""
    lvlm, made = lvlm_of(family)
    half = replace(lvlm, model=copy.deepcopy(lvlm.model).bfloat16())
    student = Student(half, Plan(lvlm.anatomy.n_layers, lvlm.anatomy.removable[-2:-1]), None, Projector())
    assert student.trained.keys() & {next(name for name, _ in half.model.named_parameters())}
    answer = torch.zeros_like(made.inputs["input_ids"], dtype=torch.bool)
    answer[:, -3:] = True
    step(student.train(), {"groups": [{**made.inputs, ANSWER: answer}]})
    assert all(bool(p.isfinite().all()) for p in student.trained.values())
    whole = replace(lvlm, model=copy.deepcopy(lvlm.model).half())
    first = next(whole.model.parameters())
    first.data = first.data.float()  # as some models keep it
    with pytest.raises(SvlError, match="not in float16"):
        check_trainable(whole, Projector())


def test_tensors_come_back_in_their_own_dtype(llama):
    """A model in bfloat16 that keeps its norms in float32."""
    model = copy.deepcopy(llama.model).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 1e-4
    student = Student(replace(llama, model=model), PLAN, None, Interlace())
    for name, change in student.changes().items():
        assert torch.equal(change.value, model.get_parameter(name)), name
        assert change.value.dtype == model.get_parameter(name).dtype


def test_samples_that_no_processor_takes_at_once_are_one_batch_all_the_same(llava, make_samples, monkeypatch):
    """In groups of equally many pictures, the loss is that of all rows together, whose answers differ in length."""
    pictured, plain = make_samples([3, 6, 4]), make_samples([5, 3], image=False)
    mixed = type(plain)("x", (*pictured, *plain))
    student = Student(llava, PLAN, None, Distill(**FAST, logits=1.0))
    batches, losses = Batches(student.lvlm, mixed), {}
    for apart in (False, True):
        monkeypatch.setattr(type(llava), "needs_equal_images", property(lambda _, apart=apart: apart))
        groups = batches([3, 0, 4, 1, 2])["groups"]
        assert sorted(len(group[ANSWER]) for group in groups) == ([2, 3] if apart else [5])
        losses[apart] = float(student(groups)["loss"].detach())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_the_loss_of_padded_texts_is_that_of_each_alone(lm, make_samples):
    """By their numbers of predicted tokens: nothing predicts the first token of a text, padding does not either."""
    texts = Samples("x", tuple(replace(s, plain=True) for s in make_samples([9, 3, 5], image=False)))
    student = Student(lm, PLAN, None, Distill(**FAST, logits=1.0))
    batches, total, n = Batches(student.lvlm, texts), {"answers": 0.0, "logits": 0.0}, 0
    for k, text in enumerate(texts):
        student(**batches([k]))
        length = len(lm.tokenizer(text.prompt)["input_ids"]) - 1
        alone, n = student.take_terms(), n + length
        total = {name: value + length * alone[name] for name, value in total.items()}
    student(**batches([0, 1, 2]))
    together = student.take_terms()
    assert {name: together[name] for name in total} == pytest.approx({k: v / n for k, v in total.items()}, rel=1e-5)


def test_the_terms_of_a_step_are_those_of_all_its_passes(llava, samples):
    student = Student(llava, PLAN, None, Distill(**FAST))
    batches = [Batches(student.lvlm, samples)([n]) for n in (0, 1, 2)]
    each = []
    for batch in batches:
        student(**batch)
        each.append(student.take_terms())
    for batch in batches:
        student(**batch)
    mean = {name: sum(one[name] for one in each) / 3 for name in each[0]}
    assert student.take_terms() == pytest.approx(mean)


def test_a_batch_without_pictures_leaves_the_projector_alone(llava, make_samples, tmp_path):
    pictured, plain = make_samples([3, 4]), make_samples([3, 4], image=False)
    mixed = type(plain)("x", (*pictured, *plain))
    student = Student(llava, PLAN, None, Projector())
    student(**Batches(student.lvlm, mixed)([2, 3]))["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.trained.values())
    assert recover(llava, PLAN, None, mixed, Projector(steps=2, batch_size=1), tmp_path).spent.steps == 2
    with pytest.raises(SvlError, match=r"no sample of recovery\.data has a picture"):
        recover(llava, PLAN, None, plain, Projector(steps=1), tmp_path)


def test_answers_are_what_the_template_adds_and_an_end(vlm, samples):
    (batch,) = Batches(vlm, samples)([0, 3])["groups"]
    for row, number in enumerate([0, 3]):
        answer = batch["input_ids"][row][batch[ANSWER][row]]
        said = vlm.tokenizer.decode(answer).replace("</s>", " </s>").split()
        assert said[-2:] == [samples.samples[number].answer, "</s>"]
        assert len(answer) < int(batch["attention_mask"][row].sum())


def test_gradient_checkpointing_and_lower_precision(llava, samples):
    """Checkpointing changes no gradient; bfloat16 products change them a little, and are kept in fp32."""

    def gradients(**settings) -> dict[str, torch.Tensor]:
        recovery = Distill(**FAST, logits=1.0, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            student = Student(llava, PLAN, None, recovery)
        if recovery.gradient_checkpointing:
            student.train()
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        student(**Batches(student.lvlm, samples)([0, 1]))["loss"].backward()
        return {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}

    plain, saving, half = gradients(), gradients(gradient_checkpointing=True), gradients(precision="bfloat16")
    assert plain.keys() == saving.keys() == half.keys()
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name])
        assert half[name].dtype == torch.float32
    flat = [torch.cat([g.flatten() for g in found.values()]) for found in (plain, half)]
    assert F.cosine_similarity(*flat, dim=0) > 0.98


# ------------------------------------------------------------------------------------- order, budget, resuming


def test_every_pass_over_the_data_is_a_new_order_of_all():
    order, again, other = (TrainingOrder(7, 7, 10, seed) for seed in (1, 1, 2))
    passes = [tuple(order[k] for k in range(7 * e, 7 * e + 7)) for e in range(10)]
    assert all(sorted(found) == list(range(7)) for found in passes)
    assert len(set(passes)) > 5
    shuffled = random.Random(0).sample(range(70), 70)
    assert [again[k] for k in shuffled] == [order[k] for k in shuffled]
    assert [other[k] for k in range(70)] != [order[k] for k in range(70)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_batches_of_every_step(count):
    """Together, in turn, they have those of one process, and each as many."""
    alone = TrainingOrder(7, 4, 12, 1)
    shares = [TrainingOrder(7, 4, 12, 1, rank, count) for rank in range(count)]
    assert {len(share) for share in shares} == {48 // count}
    together = [share[4 * batch + k] for batch in range(12 // count) for share in shares for k in range(4)]
    assert together == [alone[k] for k in range(48)]


def test_the_budget_is_counted(llava, samples, tmp_path):
    """Five samples, three at a time, twice for a step."""
    recovery = Projector(steps=3, batch_size=3, accumulate=2)
    spent = recover(llava, PLAN, None, samples, recovery, tmp_path).spent
    order = [TrainingOrder(5, 3, 6, 0)[k] for k in range(18)]
    batches = Batches(llava, samples)
    tokens = sum(int(batches([n])["groups"][0]["attention_mask"].sum()) for n in order)
    assert (spent.steps, spent.samples, spent.tokens) == (3, 18, tokens)
    assert [point["step"] for point in spent.curve] == [1, 2, 3]
    assert spent.seconds >= max(point["seconds"] for point in spent.curve) - 1e-3 > 0


@pytest.mark.parametrize(("settings", "steps"), [({"budget_s": 1e-9}, 1), ({"budget_s": 1e-9, "steps": 7}, 1), ({}, 3)])
def test_training_ends_in_time_or_after_one_pass(settings, steps, llava, samples, tmp_path):
    recovery = Projector(batch_size=2, **settings)
    assert recover(llava, PLAN, None, samples, recovery, tmp_path).spent.steps == steps


def test_with_a_limit_in_seconds_only_the_first_step_is_looked_at_beforehand(llava, samples, tmp_path):
    """Whatever the number of steps: to look at more than are used would take longer than the training."""
    data = type(samples)("x", samples.samples * 8)
    for settings, n in (
        ({"steps": 10**6, "budget_s": 5.0}, 6),
        ({"budget_s": 5.0}, 6),
        ({"steps": 3}, 18),
        ({"steps": 10**6}, 40),
        ({"steps": 0}, 0),
    ):
        recovery = Projector(batch_size=3, accumulate=2, **settings)
        assert len(set(samples_to_check(recovery, len(data)))) == n
    last = TrainingOrder(5, 1, 5, 0)[4]
    spoilt = [replace(s, answer="<image>") if i == last else s for i, s in enumerate(samples)]
    recovery = Projector(batch_size=1, budget_s=1e-9, steps=10**6)
    assert recover(llava, PLAN, None, type(samples)("x", tuple(spoilt)), recovery, tmp_path).spent.steps == 1


STOPS = 6


def test_interrupted_at_random_moments_it_ends_in_the_same_weights(llava, samples, tmp_path):
    """Each time somewhere else, with what a kill may leave; nothing that was saved is done again."""
    recovery = Distill(steps=9, save_every=2, accumulate=2, seed=5, dropout=0.1, layers="gaps", **FAST)
    alone = recover(llava, PLAN, None, samples, recovery, tmp_path / "alone")
    chance, folder = random.Random(4), tmp_path / "killed"
    furthest, stops = 0, 0

    def stop(spent, share):
        nonlocal furthest, stops
        assert spent.steps > (furthest - 1) // recovery.save_every * recovery.save_every  # from the last checkpoint on
        furthest = max(furthest, spent.steps)
        if stops < STOPS and chance.random() < 0.5:
            stops += 1
            raise KeyboardInterrupt

    for _ in range(60):
        try:
            found = recover(llava, PLAN, None, samples, recovery, folder, stop)
        except KeyboardInterrupt:
            (folder / "checkpoint-99").mkdir(parents=True, exist_ok=True)  # half-written
            (folder / "checkpoint-99" / "model.safetensors").write_bytes(b"half")
            continue
        break
    assert stops == STOPS
    assert found.trained.keys() == alone.trained.keys()
    for name, change in alone.trained.items():
        for part in ("value", "left", "right"):
            ours, theirs = getattr(found.trained[name], part), getattr(change, part)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
    assert [p["loss"] for p in found.spent.curve] == [p["loss"] for p in alone.spent.curve]
    assert (found.spent.samples, found.spent.tokens) == (alone.spent.samples, alone.spent.tokens)
    saved = [path.name for path in folder.iterdir() if path.name.startswith("step-")]
    assert saved == ["step-8"]  # one checkpoint is kept, and holds nothing but what is trained
    progress = json.loads((folder / "step-8" / "progress.json").read_text())
    assert progress["spent"]["steps"] == 8


def test_random_numbers_of_every_device_go_on_after_an_interruption(llava, samples, tmp_path, monkeypatch):
    """Of two that a model is spread over, whichever is the current one; here they are made up."""
    states = {"cuda:0": torch.tensor([10]), "cuda:1": torch.tensor([20])}
    devices = tuple(map(torch.device, ("cpu", *states)))
    monkeypatch.setattr(Lvlm, "devices", property(lambda _: devices))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state}))
    seen = []

    def report(spent, share):
        seen.append((spent.steps, *map(int, states.values())))
        states.update({name: state + 1 for name, state in states.items()})
        if len(seen) == 3:
            raise KeyboardInterrupt

    recovery = Lora(steps=4, save_every=2, rank=2, dropout=0.1, **FAST)
    with pytest.raises(KeyboardInterrupt):
        recover(llava, PLAN, None, samples, recovery, tmp_path, report)
    assert [int(state) for state in states.values()] == [10, 20]  # as if nothing had been trained
    states.update({name: state * 0 for name, state in states.items()})
    recover(llava, PLAN, None, samples, recovery, tmp_path, report)
    assert seen == [(1, 10, 20), (2, 11, 21), (3, 12, 22), (3, 12, 22), (4, 13, 23)]


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, None])
def test_a_damaged_checkpoint_is_not_gone_on_from(name, llava, samples, tmp_path, caplog):
    """Cut in half, or gone: with a warning, training begins anew, and ends in the same weights."""
    recovery = Lora(steps=4, save_every=2, rank=2, **FAST)

    def stop(spent, share):
        if spent.steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(llava, PLAN, None, samples, recovery, tmp_path / "a", stop)
    (saved,) = (tmp_path / "a").glob("step-*")
    if name is None:
        (saved / "optimizer.pt").unlink()
    else:
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: len(content) // 2])
    steps = []
    found = recover(llava, PLAN, None, samples, recovery, tmp_path / "a", lambda spent, _: steps.append(spent.steps))
    alone = recover(llava, PLAN, None, samples, recovery, tmp_path / "b")
    assert steps == [1, 2, 3, 4]
    assert f"is damaged ({name or 'optimizer.pt'}" in caplog.text
    assert all(torch.equal(found.trained[key].left, alone.trained[key].left) for key in alone.trained)


def test_checkpoints_of_another_training_are_refused(llava, make_samples, tmp_path):
    """Whatever differs is named; what a result does not depend on may differ."""
    samples, given = make_samples([3, 4, 5]), {"steps": 4, "save_every": 2, "rank": 2, **FAST}

    def train(plan=PLAN, patch=None, data=samples, recovery=None, lvlm=llava):
        return recover(lvlm, plan, patch, data, recovery or Lora(**given), tmp_path)

    train()
    other = replace(llava, model=copy.deepcopy(llava.model))
    with torch.no_grad():
        other.model.get_input_embeddings().weight[0, 0] += 1
    for change, named in (
        ({"plan": Plan(4, (2,))}, "layers"),
        ({"patch": Patch({(2, "mlp"): UPDATE})}, "weights"),
        ({"lvlm": other}, "weights"),
        ({"data": make_samples([3, 4, 6])}, "samples"),
        ({"recovery": Lora(**{**given, "learning_rate": 0.01})}, "settings"),
        ({"recovery": Distill(**given)}, "settings"),
    ):
        with pytest.raises(SvlError, match=rf"the checkpoint step-2 of a training with other {named}: give"):
            train(**change)
    assert train(recovery=Lora(**{**given, "save_every": 3})).spent.steps == 4


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(llava, samples, tmp_path, monkeypatch):
    """A disk that fills up in it, as torch tells of one."""

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 832 vs 750")

    monkeypatch.setattr("transformers.trainer.Trainer._save_optimizer_and_scheduler", full)
    with pytest.raises(RuntimeError) as caught:
        recover(llava, PLAN, None, samples, Lora(steps=4, save_every=2, rank=2, **FAST), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "is the disk full?" in (one_line(caught.value) or "")


def test_random_numbers_of_others_go_on_as_if_nothing_was_trained(llava, samples, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    recover(llava, PLAN, None, samples, Projector(steps=1), tmp_path)
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------------------------------- refusals


def test_models_and_data_that_cannot_be_trained_are_refused(llama, llava, make_samples, tmp_path, monkeypatch):
    samples, texts = make_samples([3, 4]), make_samples([3, 4], image=False)
    half = replace(llama, model=copy.deepcopy(llama.model).half())

    def refused(match, lvlm, data, recovery):
        with pytest.raises(SvlError, match=match):
            recover(lvlm, PLAN, None, data, recovery, tmp_path)

    refused("set model.dtype=bfloat16", half, texts, Lora(steps=1))
    refused("has no projector to train; choose recovery=lora", llama, texts, Projector(steps=1))
    refused("'model.nothing', but 'llava' has no such module", llava, samples, Projector(modules=("model.nothing",)))
    for path in ("", "model", "model.language_model.layers", "model.language_model.layers.3.mlp"):
        refused("decoder layers .* are trained by recovery=lora", llava, samples, Projector(modules=(path,)))
    silent = type(samples)("x", tuple(type(s)(s.row, s.prompt, s.images) for s in samples))
    refused("needs answers, but 2 samples have none", llava, silent, Lora(steps=1))
    refused("has no samples to train on", llava, type(samples)("x", ()), Lora(steps=1))
    refused("lower recovery.learning_rate", llama, texts, Lora(steps=9, learning_rate=1e30, batch_size=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("share the passes of a step", llava, samples, Lora(steps=1))


@dataclass(frozen=True)
class Chosen(Recovery):
    """Parts as they are given."""

    chosen: Parts = field(default_factory=Parts)

    def parts(self, pruned, plan):
        return self.chosen


def test_a_tensor_is_trained_in_one_way(llama):
    """Whole and adapted, it would be merged otherwise than it was trained; tied and adapted, it is not what it was."""
    first = f"{llama.anatomy.layers}.0.mlp.up_proj"
    tied = replace(llama, model=copy.deepcopy(llama.model))
    tied.model.lm_head.weight = tied.model.model.embed_tokens.weight

    def refused(match, lvlm, *parts):
        with pytest.raises(SvlError, match=match):
            Student(lvlm, PLAN, None, Chosen(chosen=Parts(*parts)))

    refused("choose one of the two", llama, (f"{first}.weight",), (first,))
    refused("name it once", tied, ("model.embed_tokens.weight", "lm_head.weight"))
    refused("attach to 'lm_head' of 'llama': its weight is 'model.embed_tokens.weight', too", tied, (), ("lm_head",))
    assert len(Student(llama, PLAN, None, Chosen(chosen=Parts((), ("lm_head",)))).trained) == 2


def test_a_tensor_that_pruning_cuts_is_refused_before_training():
    """Gemma 4 has one matrix for what enters each layer; the pruned model has less of it than the dense one."""
    gemma, _ = lvlm_of("gemma4")
    path = "model.language_model.per_layer_model_projection"
    with pytest.raises(SvlError, match=rf"cannot train '{path}\.weight'.*\(\d+, 32\), as .*; leave it out"):
        Student(gemma, Plan(gemma.anatomy.n_layers, (1,)), None, Projector(modules=(path,)))


def test_every_sample_is_looked_at_before_the_first_step(llava, llama, make_samples, tmp_path):
    """A picture that is cut off, a mark within an answer, a text of one token: named before anything is trained."""
    samples, texts = make_samples([3, 4, 3, 4]), make_samples([3, 4, 3], image=False)

    def refused(match, lvlm, data, changes, **settings):
        last = replace(data.samples[-1], **changes)
        spoilt = type(data)("mine.parquet", (*data.samples[:-1], last))
        steps = []
        recovery = Lora(batch_size=1, rank=2, **settings)
        with pytest.raises(SvlError, match=match):
            recover(lvlm, PLAN, None, spoilt, recovery, tmp_path, lambda spent, _: steps.append(spent))
        assert steps == []

    cut = samples.samples[-1].images[0][:-20]
    refused("picture", llava, samples, {"images": (cut,)})
    refused("image", llava, samples, {"answer": "it is <image>"})
    refused("calibration row 3: .*contains <image>", llava, samples,
            {"prompt": "the <image> is red", "plain": True, "images": ()})  # fmt: skip
    refused("fewer than two tokens", llama, texts, {"prompt": "", "answer": "", "plain": True})
    for plain in (False, True):  # as many tokens as there are positions are not too many
        model = copy.deepcopy(llama.model)
        short, long = replace(llama, model=model), {"prompt": "the " * 30, "answer": "red", "plain": plain}
        (groups,) = Batches(llama, type(texts)("x", (replace(texts.samples[0], **long),)))([0])["groups"]
        model.config.max_position_embeddings = n = groups["input_ids"].shape[1]
        Batches(short, type(texts)("x", (replace(texts.samples[0], **long),))).check([0])
        model.config.max_position_embeddings = n - 1
        refused(rf"row 2 of '.*' has {n} tokens with its answer, but 'llama' reads at most {n - 1} ",
                short, texts, {**long, "source": "mine"})  # fmt: skip


def test_weights_that_are_not_finite_are_not_kept(llava, samples):
    student = Student(llava, PLAN, None, Projector())
    with torch.no_grad():
        next(iter(student.trained.values())).fill_(torch.inf)
    with pytest.raises(SvlError, match=r"not finite: lower recovery\.learning_rate"):
        student.changes()


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Lora, {"learning_rate": float("inf")}, "recovery.learning_rate is inf, but must be a finite number"),
        (Lora, {"weight_decay": float("nan")}, "recovery.weight_decay is nan, but must be a finite number"),
        (Distill, {"temperature": float("inf")}, "recovery.temperature is inf, but must be a finite number"),
        (Lora, {"alpha": 0}, "recovery.alpha is 0, but must be at least 1"),
        (Lora, {"seed": -1}, "recovery.seed is -1, but must be at least 0"),
        (Lora, {"seed": 2**32}, "recovery.seed is 4294967296, but must be at most 4294967295"),
        (Lora, {"steps": 10**20, "budget_s": 1.0}, "recovery.steps is 100000000000000000000, but must be at most"),
        (Lora, {"batch_size": 10**20}, "recovery.batch_size is 100000000000000000000, but must be at most"),
        (Lora, {"accumulate": 10**20}, "recovery.accumulate is 100000000000000000000, but must be at most"),
        (Lora, {"rank": 0}, "recovery.rank is 0"),
        (Lora, {"layers": "all"}, "recovery.layers is 'all', but must be one of: kept, gaps"),
        (Lora, {"steps": -1}, "recovery.steps is -1, but must be at least 0"),
        (Lora, {"budget_s": 0.0}, "recovery.budget_s is 0, but must be above 0"),
        (Distill, {"answers": 0.0, "states": 0.0}, "are all 0"),
        (Projector, {"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings, message):
    with pytest.raises(SvlError, match=message.replace("(", r"\(")):
        cls(**settings)


def test_a_model_that_devices_share_is_trained_through_its_hooks(llava, samples, tmp_path):
    """accelerate's hooks on every module, as `model.device_map` puts them: the same weights come out."""
    from accelerate import dispatch_model

    model = dispatch_model(copy.deepcopy(llava.model), {"": "cpu"}, force_hooks=True)
    spread = replace(llava, model=model)
    recovery = Distill(steps=2, layers="gaps", logits=1.0, **FAST)
    ours = recover(spread, PLAN, None, samples, recovery, tmp_path / "spread").trained
    theirs = recover(llava, PLAN, None, samples, recovery, tmp_path / "plain").trained
    assert ours.keys() == theirs.keys()
    for name, change in theirs.items():
        for part in ("value", "left", "right"):
            assert getattr(change, part) is None or torch.equal(getattr(ours[name], part), getattr(change, part))
