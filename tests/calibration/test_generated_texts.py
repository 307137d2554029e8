"""Texts that models write themselves."""

from __future__ import annotations

import pytest
import torch

from svl.calibration.generated_texts import generate_texts
from svl.core import SvlError


def test_texts_are_the_same_for_the_same_seed_and_hold_no_special_token(lm):
    texts = generate_texts(lm, 35, 12, seed=3)  # two batches
    assert texts == generate_texts(lm, 35, 12, seed=3)
    assert texts != generate_texts(lm, 35, 12, seed=4)
    assert len(set(texts)) > 30
    assert {len(text.split()) for text in texts} == {12}  # a token is a word
    assert not set(lm.tokenizer.all_special_tokens) & {word for text in texts for word in text.split()}


def test_tokens_come_as_often_as_the_model_says(llama):
    """Second tokens of many texts against the softmax of a plain forward pass over each first token."""
    n, tokenizer = 3000, llama.tokenizer
    texts = generate_texts(llama, n, 2, seed=0)
    pairs = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids for text in texts])
    prompts = torch.cat([torch.full((n, 1), tokenizer.bos_token_id), pairs[:, :1]], 1)
    with torch.no_grad():
        scores = llama.model(input_ids=prompts).logits[:, -1].clone().double()
    scores[:, tokenizer.all_special_ids] = -torch.inf
    chance = scores.softmax(-1)
    found = torch.bincount(pairs[:, 1], minlength=chance.shape[1])
    error = (chance * (1 - chance)).sum(0).sqrt()
    assert bool(((found - chance.sum(0)).abs() <= 4.5 * error + 1e-6).all())
    assert float(error.max()) > 5  # so many that it would show
    firsts = torch.bincount(pairs[:, 0], minlength=chance.shape[1])
    words = chance[0] > 0
    assert int(firsts[~words].sum()) == 0
    assert float((firsts[words] - n / int(words.sum())).abs().max()) < 5 * (n / int(words.sum())) ** 0.5


def test_texts_of_one_token_need_no_model(llama):
    assert all(len(text.split()) == 1 for text in generate_texts(llama, 5, 1, seed=0))


def test_a_model_that_cannot_write_text_is_refused(llama, monkeypatch):
    def fail(*_, **__):
        raise ValueError("pictures first")

    for generate, reason in ((None, ""), (fail, ": .*pictures first")):
        monkeypatch.setattr(llama.model, "generate", generate)
        with pytest.raises(SvlError, match=f"'llama' cannot generate text{reason}; set calibration.generated=0"):
            generate_texts(llama, 2, 4, seed=0)
