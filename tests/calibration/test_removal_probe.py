"""Losses without layers against the loss of the rebuilt model."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from helpers.references import rebuilt_losses
from hypothesis import given, settings
from hypothesis import strategies as st

from svl.calibration.calibrate import calibrate
from svl.calibration.removal_probe import ModelProbe
from svl.core import Plan, SvlError
from svl.data.samples import Sample, Samples
from svl.models.layer_calls import hooked
from svl.models.sample_inputs import encode_answer
from svl.pruning.surgery import apply
from svl.strategies.sleb import Sleb


@pytest.fixture
def plain(make_samples):
    """The same samples as running text."""
    return Samples("plain", tuple(replace(e, plain=True, images=()) for e in make_samples([5, 9, 12]).samples))


def test_losses_are_those_of_rebuilt_models(lm, samples):
    """With and without the memory to keep states."""
    probes = [ModelProbe(lm, samples, memory=memory) for memory in (0, 2**31)]
    for removed in ((), (1,), (1, 3), (0, 3), (2,)):  # deeper, and back again
        tried = [i for i in range(4) if i not in removed][:-1]
        expected, *without = rebuilt_losses(lm, samples, [removed, *((*removed, i) for i in tried)])
        for probe in probes:
            base, losses = probe.losses(removed, tried)
            assert base == pytest.approx(expected, abs=1e-5)
            assert losses == pytest.approx(dict(zip(tried, without, strict=True)), abs=1e-5)


def test_losses_of_text_count_every_next_token(llama, plain):
    base, losses = ModelProbe(llama, plain).losses((), (1, 2))
    total, n = 0.0, 0
    for example in plain.samples:
        inputs = llama.encode([example.prompt])
        with torch.inference_mode():
            loss = llama.model(**inputs, labels=inputs["input_ids"]).loss
        size = inputs["input_ids"].shape[1] - 1
        total, n = total + float(loss) * size, n + size
    assert base == pytest.approx(total / n, abs=1e-5)
    assert losses.keys() == {1, 2}


def test_only_the_answer_is_scored(vlm, samples):
    for example in samples.samples:
        inputs, answer = encode_answer(vlm, example)
        text = vlm.tokenizer.decode(inputs["input_ids"][0][answer], skip_special_tokens=True)
        assert text.split() == [example.answer]
        assert not (answer & (inputs["input_ids"][0] == vlm.anatomy.image_token_id)).any()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 99))
def test_other_samples_and_their_padding_never_matter(llama, make_samples, lengths, batch_size, seed):
    data = make_samples(lengths, image=False, seed=seed)
    alone = [calibrate(llama, Samples("one", (e,))).traces[0] for e in data.samples]
    for one, trace in zip(alone, calibrate(llama, data, batch_size=batch_size).traces, strict=True):
        torch.testing.assert_close(one.windows, trace.windows, atol=1e-5, rtol=0)
    base, _ = ModelProbe(llama, data).losses((), ())
    parts = [(ModelProbe(llama, Samples("one", (e,))).losses((), ())[0], e) for e in data.samples]
    counts = [int(encode_answer(llama, e)[1].sum()) for _, e in parts]
    assert base == pytest.approx(sum(x * n for (x, _), n in zip(parts, counts, strict=True)) / sum(counts), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_padding_pictures_and_prompts_are_never_scored(vlm, make_samples, seed):
    """The model's own loss over one batch, padded by chance, whose labels are the answers and nothing else."""
    chance = random.Random(seed)
    lengths, extra = [chance.randint(1, 14) for _ in range(chance.randint(2, 4))], chance.randint(0, 5)
    data = make_samples(lengths, seed=seed)
    inputs, answers = zip(*(encode_answer(vlm, e) for e in data.samples), strict=True)
    width = extra + max(a.shape[0] for a in answers)
    batch = vlm.encode(
        [vlm.prompt(e.prompt, True, e.answer).rstrip("\n") for e in data.samples], [e.pictures for e in data.samples]
    )
    labels = torch.full((len(lengths), width), -100)
    tokens, mask = torch.zeros_like(labels), torch.zeros_like(labels)
    for row, (one, answer) in enumerate(zip(inputs, answers, strict=True)):
        n = len(answer)
        tokens[row, width - n :], mask[row, width - n :] = one["input_ids"][0], 1
        labels[row, width - n :][answer] = one["input_ids"][0][answer]
    kinds = {"mm_token_type_ids": (tokens == vlm.anatomy.image_token_id).long()} if "mm_token_type_ids" in batch else {}
    batch = {name: x for name, x in batch.items() if x.shape != batch["input_ids"].shape}
    batch |= {"input_ids": tokens, "attention_mask": mask, **kinds}
    removed = seed % 4
    with torch.inference_mode():
        losses = [float(m.model(**batch, labels=labels).loss) for m in (vlm, apply(vlm, Plan(4, (removed,))))]
    base, without = ModelProbe(vlm, data).losses((), (removed,))
    assert [base, without[removed]] == pytest.approx(losses, abs=1e-4)


def test_losses_that_are_not_finite_are_refused(llama, samples):
    broken = replace(llama, model=copy.deepcopy(llama.model))
    mark = torch.eye(32)[0] * 1e4
    broken.layers[1].register_forward_hook(lambda _, args, out: out + mark)
    broken.layers[2].register_forward_hook(lambda _, args, out: out.where(out[..., :1] > 5e3, math.inf) - mark)
    probe = ModelProbe(broken, samples)
    assert probe.losses((), (0,))[1].keys() == {0}
    with pytest.raises(SvlError, match=r"loss of 'llama' without layer 1 is not finite.*choose another model\.dtype"):
        probe.losses((), (0, 1))
    broken.layers[3].register_forward_hook(lambda _, args, out: out * math.nan)
    with pytest.raises(SvlError, match=r"logits of 'llama' are not finite"):
        ModelProbe(broken, samples).losses((), (0,))


def test_samples_without_answers_are_refused(llava, samples):
    for blank in ("", "  ", "\n\n"):
        silent = Samples("silent", tuple(replace(e, answer=blank) for e in samples.samples))
        with pytest.raises(SvlError, match="needs answers, but 5 samples have none, calibration row 0 for one"):
            ModelProbe(llava, silent)


def test_what_was_measured_is_not_measured_again(llama, samples):
    known = {}

    def remember(what, inputs, compute):
        key = f"{what} {inputs}"
        if key not in known:
            known[key] = compute()
        return known[key]

    first = ModelProbe(llama, samples, remember=remember)
    short = Sleb().plan(replace(calibrate(llama, samples), probe=first), 1)
    again, calls = replace(calibrate(llama, samples), probe=ModelProbe(llama, samples, remember=remember)), []
    with hooked([llama.layers[-1].register_forward_hook(lambda *_: calls.append("called"))]):
        assert Sleb().plan(again, 1) == short
    assert not calls


def test_answers_of_every_kind_are_found(qwen):
    one = Sample(0, "x", answer="the of and")
    with pytest.raises(SvlError, match="adds no token"):
        encode_answer(qwen, replace(one, answer=""))
