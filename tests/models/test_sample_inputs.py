"""Samples that a model cannot take, and memory that runs out: one line that says where, and what to do."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import svl
from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, check_selector
from svl.calibration.removal_probe import ModelProbe
from svl.core import Plan, SvlError
from svl.data.sample_files import read_samples
from svl.data.samples import Sample, Samples
from svl.models.sample_inputs import answered_text, encode_answer, encode_samples
from svl.recovery.batches import ANSWER, Batches
from svl.selectors.visual import Visual

PLAN = Plan(4, (1,))


def changed(samples: Samples, row: int, **fields) -> Samples:
    """The samples, read from a file, with one of them changed."""
    own = [replace(s, source="my.jsonl") for s in samples]
    own[row] = replace(own[row], **fields)
    return Samples("my.jsonl", tuple(own))


def in_one_line(message: str):
    """The error that is expected, in one line."""
    return pytest.raises(SvlError, match=rf"(?s)^(?!.*\n).*{message}")


def with_processor(lvlm, **attributes):
    """The model with a changed copy of its processor."""
    processor = copy.deepcopy(lvlm.processor)
    for name, value in attributes.items():
        setattr(processor, name, value)
    return replace(lvlm, processor=processor)


def test_a_picture_that_the_processor_refuses_is_named(qwen, samples, tmp_path):
    """Qwen-VL takes no picture 200 times as long as it is wide."""
    Image.fromarray(np.zeros((4, 1000, 3), dtype=np.uint8)).save(tmp_path / "long.png")
    (long,) = read_samples(tmp_path)
    data = changed(samples, 3, images=long.images)
    for size in (1, 5):
        with in_one_line(r"row 3 of 'my\.jsonl' does not go through the model: .*aspect ratio.*; leave the sample out"):
            calibrate(qwen, data, batch_size=size)
    with in_one_line(r"row 3 of 'my\.jsonl'.*aspect ratio"):
        ModelProbe(qwen, data).losses((), (1,))
    with in_one_line(r"row 3 of 'my\.jsonl'.*aspect ratio"):
        list(Activations(qwen, data, calibrate(qwen, samples, statistics=[])).stream([1]))


def test_pictures_that_fill_more_places_than_they_have_are_named(llava, samples):
    """A processor that counts the patches of a picture otherwise than the model does."""
    wrong, data = with_processor(llava, patch_size=8), changed(samples, 0)
    with in_one_line(r"row 0 of 'my\.jsonl' does not go through the model: .*features.*; .*model\.image_token"):
        calibrate(wrong, data, batch_size=1)
    with in_one_line(r"row 0 of 'my\.jsonl', or one of the rows 1, 2 \(calibration\.batch_size=1 tells which\)"):
        calibrate(wrong, data, batch_size=3)


def test_words_that_the_model_has_no_vector_for_are_named(llama, make_samples):
    tokenizer = copy.deepcopy(llama.processor)
    tokenizer.add_tokens(["zebra"])
    data = changed(make_samples([3, 5], image=False), 1, prompt="zebra")
    with in_one_line(r"row 1 of 'my\.jsonl' does not go through the model: IndexError"):
        calibrate(replace(llama, processor=tokenizer), data, batch_size=1)


def test_a_template_that_refuses_a_prompt_is_named(llama, make_samples):
    template = "{% if 'zebra' in messages[0]['content'] %}{{ 1 / 0 }}{% endif %}{{ messages[0]['content'] }}"
    wrong = with_processor(llama, chat_template=template)
    data = changed(make_samples([3, 4, 5], image=False), 1, prompt="zebra")
    for ask in (
        lambda: calibrate(wrong, data),
        lambda: encode_answer(wrong, data.samples[1]),
        lambda: check_selector(wrong, data, Visual()),
    ):
        with in_one_line(r"row 1 of 'my\.jsonl': .*template.*ZeroDivisionError"):
            ask()


def test_a_prompt_with_the_mark_of_a_picture_is_named(qwen, samples):
    with in_one_line(r"row 2 of 'my\.jsonl': the prompt '<\|image_pad\|> what' contains <\|image_pad\|>"):
        calibrate(qwen, changed(samples, 2, prompt="<|image_pad|> what"))


def test_a_video_for_a_model_without_videos_is_refused(llava, samples):
    data = changed(samples, 2, images=(), frames=samples.samples[2].images * 2)
    with in_one_line(r"row 2 of 'my\.jsonl' has a video, but 'llava' takes none; give its frames as images"):
        calibrate(llava, data)


# --------------------------------------------------------------------------- several pictures, several turns


@pytest.mark.parametrize(
    ("behind", "end"),
    [
        ("", "</s>"),
        (" ", "</s>"),  # LLaVA-1.5's and LLaVA-NeXT's on the hub
        (" . \n", "</s>"),
        ("<|vision_end|>\n", "<|vision_end|>"),  # a token for ends of turns, at which generation is not told to stop
        ("</s>", "</s>"),
        (" </s>\n<s> in", " </s>"),
        ("<|vision_end|> </s>", "<|vision_end|> </s>"),
    ],
)
def test_an_answer_ends_in_what_ends_the_models_answers(behind, end, llava, samples):
    """Whatever the template writes there; losses and training take the same tokens."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}in {{ m['content'][-1]['text'] }} "
        f"{{% else %}}of {{{{ m['content'][0]['text'] }}}}{{{{ {behind!r} }}}}{{% endif %}}{{% endfor %}}"
        "{{ 'of' if add_generation_prompt }}"
    )
    lvlm = with_processor(llava, chat_template=template)
    sample = replace(samples.samples[0], images=(), answer="red green")
    assert answered_text(lvlm, sample) == f"in {sample.prompt} of red green{end}"
    inputs, answer = encode_answer(lvlm, sample)
    expected = lvlm.tokenizer(f"red green{end}", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"][0][answer].tolist() == expected
    (batch,) = Batches(lvlm, Samples("x", (sample,)))([0])["groups"]
    assert batch["input_ids"][batch[ANSWER]].tolist() == expected


def test_training_teaches_every_hub_model_to_stop(mimic, make_samples):
    """After each answer stands a token at which its generation stops, where its own templates write a space."""
    for name in ("llava_15_7b", "llava_next_7b", "gemma3_4b", "paligemma2_3b"):
        lvlm = svl.load(mimic(name), device="cpu", dtype="float32")
        samples = make_samples([3, 4], image=name != "paligemma2_3b")
        stops = lvlm.model.generation_config.eos_token_id
        (batch,) = Batches(lvlm, samples)([0, 1])["groups"]
        ends = batch["input_ids"][:, -1]
        assert torch.isin(ends, torch.tensor(stops)).all(), name
        assert batch[ANSWER][:, -1].all()


def placed(lvlm, prompt: str, pictures: int) -> list[str]:
    """The tokens of a sample whose pictures all look alike; "*" are visual ones."""
    image = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(image, "png")
    inputs, _, visual = encode_samples(lvlm, [Sample(0, prompt, (image.getvalue(),) * pictures)])
    tokens = lvlm.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    return ["*" if seen else token for token, seen in zip(tokens, visual[0].tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_pictures_stand_where_their_marks_are(kind, request):
    lvlm = request.getfixturevalue(kind)
    alone = placed(lvlm, "what is red", 1).count("*")
    assert alone > 0
    first = placed(lvlm, "what is red", 3)
    assert first.count("*") == 3 * alone
    assert first == placed(lvlm, "<image><image><image>what is red", 3)
    between = placed(lvlm, "<image> what <image> is red", 2)
    assert between.count("*") == 2 * alone
    what, red = (next(i for i, token in enumerate(between) if word in token) for word in ("what", "red"))
    assert between[:what].count("*") == between[what:red].count("*") == alone


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_a_batch_of_unlike_samples_is_calibrated_as_each_alone(kind, request, samples):
    """One picture, three, none, and a conversation."""
    lvlm = request.getfixturevalue(kind)
    one, two, three, four, _ = samples.samples
    several = replace(two, images=(*two.images, *one.images, *four.images))
    talk = replace(four, earlier=(("user", "how many"), ("assistant", "the red of one")))
    mixed = Samples("mixed", (one, several, replace(three, images=()), talk))
    together = calibrate(lvlm, mixed, batch_size=4).traces
    for trace, sample in zip(together, mixed, strict=True):
        (alone,) = calibrate(lvlm, Samples("alone", (sample,)), batch_size=1).traces
        assert trace.visual.equal(alone.visual)
        torch.testing.assert_close(trace.cosine, alone.cosine, atol=1e-5, rtol=0)


def test_a_prompt_beside_running_text_begins_as_it_does_alone(mimic, make_samples):
    """Gemma's template writes <bos>, which its tokenizer puts before running text: each has one, at the same place."""
    gemma = svl.load(mimic("gemma3_4b"), device="cpu", dtype="float32")
    asked = [replace(s, source="a") for s in make_samples([2, 40])]
    plain = Sample(2, "the red of the green " * 9, plain=True)
    for batch in ([asked[0], plain], [plain, asked[1]], [asked[0], plain, asked[1]]):
        inputs, present, _ = encode_samples(gemma, batch)
        for row, sample in enumerate(batch):
            alone, _, _ = encode_samples(gemma, [sample])
            assert inputs["input_ids"][row][present[row]].tolist() == alone["input_ids"][0].tolist()
            types = inputs["token_type_ids"][row][present[row]] if "token_type_ids" in inputs else None
            assert types is None or types.equal(alone["token_type_ids"][0])


@pytest.mark.parametrize("name", ["internvl3_8b", "llava_onevision_7b", "qwen2_5_vl_7b"])
def test_videos_of_unequal_length_are_calibrated_as_each_alone(name, mimic, make_samples):
    """In one set, in its order: statistics and hidden states; beside samples with a picture, and with nothing."""
    lvlm = svl.load(mimic(name), device="cpu", dtype="float32", name=name)
    pictures = [make_samples([1], seed=seed).samples[0].images[0] for seed in range(8)]  # of one size
    videos = [pictures[:4], pictures[2:4], [], pictures[4:], pictures[1:5], [], pictures[:1], pictures]
    made = [replace(s, images=(), frames=tuple(v)) for s, v in zip(make_samples([3] * 8), videos, strict=True)]
    made[5] = replace(made[5], images=(pictures[0],))
    mixed = Samples("mixed", tuple(made))
    together = calibrate(lvlm, mixed, batch_size=8)
    states = list(Activations(lvlm, mixed, together, batch_size=8).stream([1]))
    for sample, trace, state in zip(mixed, together.traces, states, strict=True):
        one = Samples("alone", (sample,))
        alone = calibrate(lvlm, one, batch_size=1)
        (expected,) = alone.traces
        assert trace.index == sample.row
        assert trace.visual.equal(expected.visual)
        assert bool(trace.visual.any()) == bool(sample.frames or sample.images)
        torch.testing.assert_close(trace.cosine, expected.cosine, atol=1e-5, rtol=0)
        (expected_state,) = Activations(lvlm, one, alone, batch_size=1).stream([1])
        torch.testing.assert_close(state.h(1), expected_state.h(1), atol=1e-4, rtol=1e-4)


def test_the_turns_before_the_question_are_part_of_the_prompt(llama):
    sample = Sample(0, "what is red", earlier=(("user", "how is it"), ("assistant", "the one")))
    inputs, _, _ = encode_samples(llama, [sample])
    words = " ".join(llama.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()))
    assert -1 < words.find("user how is") < words.find("the") < words.find("what is red"), words


# ----------------------------------------------------------------------------------------------- memory


def fail_in(layer, error):
    """From now on, the layer runs out of memory."""

    def fail(*_):
        raise error

    return layer.register_forward_hook(fail)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_names_what_to_turn_down(error, llama, make_samples):
    data = make_samples([3, 5], image=False)
    stats, probe = calibrate(llama, data, statistics=["cosine"]), ModelProbe(llama, data)
    asked = {
        r"calibration ran out of memory.*lower calibration\.batch_size \(now 2\), or set model\.offload": (
            lambda: calibrate(llama, data, batch_size=2)
        ),
        r"compensation ran out of memory.*lower calibration\.batch_size \(now 1\)": (
            lambda: list(Activations(llama, data, stats, batch_size=1).stream([2]))
        ),
        r"compensation ran out of memory.*lower calibration\.samples \(now 2\)": (
            lambda: list(Activations(llama, data, stats).walk(PLAN))
        ),
        r"planning ran out of memory.*lower strategy\.samples or calibration\.samples": (
            lambda: probe.losses((), (1, 2))
        ),
    }
    handle = fail_in(llama.layers[1], error)
    try:
        for message, ask in asked.items():
            with in_one_line(message):
                ask()
    finally:
        handle.remove()
    assert len(list(Activations(llama, data, stats).stream([2]))) == 2  # and afterwards all is well


def test_a_gradient_that_takes_too_much_memory_is_an_error_of_planning(llama, make_samples, monkeypatch):
    probe = ModelProbe(llama, make_samples([3], image=False))

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.autograd, "grad", fail)
    with in_one_line(r"planning ran out of memory.*set model\.device=cpu"):
        probe.taylor()
