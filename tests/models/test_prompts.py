"""Prompt styles: the text around a question, as checkpoints without a chat template were trained on."""

from __future__ import annotations

import pytest
from PIL import Image

from svl.core import SvlError
from svl.models.prompts import with_prompt_style


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
    assert with_prompt_style(llava, "paligemma").render([turn]) == "<image>answer en What is it?"
    assert with_prompt_style(llava, "plain").render([turn]) == "<image>\nWhat is it?\n"
    assert with_prompt_style(llava, "chat").render([turn]) == llava.render([turn])
    assert llava.processor.chat_template == template  # untouched
    with pytest.raises(SvlError, match=r"model\.prompt is 'vicuna'.*did you mean 'vicuna_v1'"):
        with_prompt_style(llava, "vicuna")

    small = with_prompt_style(qwen, "chat", {"size": {"shortest_edge": 64, "longest_edge": 256}})
    image = Image.new("RGB", (64, 64))
    counts = [len(m.encode([m.prompt("is", image=True)], [[image]])["pixel_values"]) for m in (qwen, small)]
    assert counts[1] < counts[0]
    with pytest.raises(SvlError, match=r"has no setting 'sizes'.*did you mean 'size'"):
        with_prompt_style(qwen, "chat", {"sizes": {}})
