"""Texts that the dense model writes itself: what a compensation should not spoil, known without any data.

Each text begins with one random token and goes on as the model samples it, at temperature 1 from its whole vocabulary
but special tokens, for a fixed number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from svl.core import SvlError
from svl.core.errors import explained, out_of_memory
from svl.models.lvlm import Lvlm, Progress, no_progress

BATCH = 32  # texts at once; fixed, as batches of other sizes would draw other texts
WAY_OUT = "set calibration.generated=0"


def generate_texts(lvlm: Lvlm, n: int, tokens: int, seed: int, show: Progress = no_progress) -> list[str]:
    """`n` texts of `tokens` tokens each; on CPUs, the same for the same seed.

    Raises:
        SvlError: if the model cannot write text, or is not in memory.
    """
    lvlm.require_in_memory("generating texts")
    special = _special_tokens(lvlm)
    words = [i for i in range(len(lvlm.tokenizer)) if i not in special]
    if not words or not callable(getattr(lvlm.model, "generate", None)):
        raise SvlError(f"'{lvlm.name}' cannot generate text; {WAY_OUT}")
    draws = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(words)
    starts = allowed[torch.randint(len(words), (n,), generator=draws)].split(BATCH)
    texts: list[str] = []
    with out_of_memory("generating texts", "lower calibration.generated_tokens"):
        for first in show(starts, "generate", len(starts)):
            texts.extend(_continued(lvlm, first, tokens, _Sampling(allowed, draws)))
    for mark in filter(None, special.values()):  # which a model may also have spelt out of other tokens
        texts = [text.replace(mark, "") for text in texts]
    return texts


def _special_tokens(lvlm: Lvlm) -> dict[int, str]:
    """By their ids, tokens that are no text: those that the tokenizer calls special, and marks of images."""
    tokenizer: Any = lvlm.tokenizer
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = sorted({*tokenizer.all_special_ids, *added, *lvlm.anatomy.visual_token_ids})
    return dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))


def _continued(lvlm: Lvlm, first: Tensor, tokens: int, sampling: _Sampling) -> list[str]:
    """A text for each token of `first` [B], which follows what the tokenizer puts before every text."""
    tokenizer: Any = lvlm.tokenizer
    opening = [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
    prompt = torch.tensor([[*opening, int(token)] for token in first], device=lvlm.device)
    with explained(f"'{lvlm.name}' cannot generate text", f"; {WAY_OUT}"), torch.inference_mode():
        ids = prompt if tokens == 1 else _sampled(lvlm, prompt, tokens - 1, sampling)
        return tokenizer.batch_decode(ids[:, len(opening) :], clean_up_tokenization_spaces=False)


def _sampled(lvlm: Lvlm, prompt: Tensor, n: int, sampling: _Sampling) -> Tensor:
    """The prompts [B, T] and `n` tokens after each."""
    model: Any = lvlm.model
    settings = GenerationConfig(
        do_sample=False,  # the noise of `sampling` makes the largest score a sample
        repetition_penalty=1.0,
        max_new_tokens=n,
        min_new_tokens=n,
        pad_token_id=int(prompt[0, -1]),  # never written: all texts are as long
    )
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    found: Tensor = model.generate(**inputs, generation_config=settings, logits_processor=[sampling])
    return found


class _Sampling:
    """Scores plus Gumbel noise, the largest of which is a sample of the softmax over the tokens `allowed`."""

    def __init__(self, allowed: Tensor, draws: torch.Generator):
        self.allowed, self.draws = allowed, draws

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape).exponential_(generator=self.draws).log_()
        barred = torch.full(scores.shape[1:], torch.inf)  # special tokens, and rows that only fill up the vocabulary
        barred[self.allowed] = 0
        return scores.float() - (noise + barred).to(scores.device)
