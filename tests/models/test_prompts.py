"""Prompt styles: the text around a question, as checkpoints without a chat template were trained on."""

from __future__ import annotations

import pytest
from helpers.hub_mimics import MIMICS
from omegaconf import OmegaConf
from PIL import Image

import svl
from svl.config import CONF
from svl.core import SvlError
from svl.models.prompts import STYLES, with_prompt_style


def test_prompt_styles(llava, qwen):
    template = llava.processor.chat_template
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    said = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    again = {"role": "user", "content": "Sure?"}
    vicuna = with_prompt_style(llava, "vicuna_v1")
    assert vicuna.render([turn]) == f"{system} USER: <image>\nWhat is it? ASSISTANT:"
    expected = f"{system} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert vicuna.render([turn, said, again]) == expected
    assert with_prompt_style(llava, "paligemma").render([turn]) == "<image>answer en What is it?\n"
    assert with_prompt_style(llava, "plain").render([turn]) == "<image>\nWhat is it?\n"
    assert with_prompt_style(llava, "chat").render([turn]) == llava.render([turn])
    assert llava.processor.chat_template == template  # untouched
    with pytest.raises(SvlError, match=r"model\.prompt is 'vicuna'.*did you mean 'vicuna_v1'"):
        with_prompt_style(llava, "vicuna")

    small = with_prompt_style(qwen, "chat", {"size": {"shortest_edge": 64, "longest_edge": 256}})
    image = Image.new("RGB", (64, 64))
    counts = [len(m.encode([m.prompt("is", images=1)], [[image]])["pixel_values"]) for m in (qwen, small)]
    assert counts[1] < counts[0]
    with pytest.raises(SvlError, match=r"has no setting 'sizes'.*did you mean 'size'"):
        with_prompt_style(qwen, "chat", {"sizes": {}})


CONVERSED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]


def answered(turns: list, answer: str) -> list:
    return [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


@pytest.mark.parametrize("kind", ["llava", "qwen", "llama"])
@pytest.mark.parametrize("style", sorted(set(STYLES) - {"chat"}))
def test_what_is_answered_begins_with_what_is_asked_and_ends_where_the_model_does(style, kind, request):
    """Over several turns."""
    lvlm, turns = with_prompt_style(request.getfixturevalue(kind), style), CONVERSED
    for again in ("how many", "where"):
        before, after = lvlm.render(turns), lvlm.render(answered(turns, f"one {again}"))
        assert after.startswith(before)
        assert after.removeprefix(before).strip() == f"one {again}{lvlm.tokenizer.eos_token}"
        turns = [*answered(turns, f"one {again}"), {"role": "user", "content": [{"type": "text", "text": again}]}]
        assert lvlm.render(turns).startswith(after)


@pytest.mark.parametrize("name", sorted(MIMICS))
def test_so_it_is_in_the_styles_of_checkpoints(name, mimic):
    """Their own ones, or those that conf/model names for them; the end is one of a turn there, if not of all."""
    said = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    lvlm = with_prompt_style(svl.load(mimic(name), device="cpu"), said.get("prompt", "chat"))
    before, after = lvlm.render(CONVERSED).rstrip(), lvlm.render(answered(CONVERSED, "green")).rstrip()
    assert after.startswith(before)
    last = lvlm.tokenizer(after)["input_ids"][-1]
    assert lvlm.tokenizer.added_tokens_decoder[last].special
    assert after.removeprefix(before).strip() == f"green{lvlm.tokenizer.convert_ids_to_tokens(last)}"
