"""LLaMA's SentencePiece vocabulary, read by SentencePiece itself, and the original's way with images.

The original cuts a prompt at `<|image|>` and encodes every text between by itself, each with the blank that
SentencePiece puts before a text. Here, `<|image|>` is one more token, after the vocabulary's last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

IMAGE = "<|image|>"
BLANK = "▁"  # as SentencePiece writes it


class MPLUGOwl2Tokenizer(SentencePieceBackend):
    """Text to tokens and back, for mPLUG-Owl2.

    Every text starts with `<s>`. If a prompt starts with an image, however, the original has none before it and one
    before every text after an image; so it is here.

    Args:
        vocab_file: a SentencePiece model, LLaMA's `tokenizer.model`.
        legacy: whether a text that follows a special token starts with a blank, too, as it did at first.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, legacy: bool = True, **kwargs: Any):
        kwargs = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **kwargs}
        kwargs["clean_up_tokenization_spaces"] = False
        super().__init__(vocab_file=vocab_file, **kwargs)  # in its own legacy mode: blanks are dealt with here
        self.legacy = self.init_kwargs["legacy"] = legacy
        self.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """Tokens of a prompt, without `<s>`."""
        tokens: list[str] = []
        for i, chunk in enumerate(text.split(IMAGE)):
            if i:
                tokens.append(IMAGE)
            if chunk:
                whole = chunk if self.legacy else BLANK + chunk.replace(BLANK, " ")
                tokens += super().tokenize(whole, **kwargs)
        return tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Tokens of a text between special tokens; where it starts a chunk, `tokenize` has marked it with a blank."""
        if self.legacy or text.startswith(BLANK):
            return self.sp_model.encode(text if self.legacy else text[1:], out_type=str)
        first, *rest = self.sp_model.encode(text, out_type=str)
        if not text.startswith(" "):
            first = first.removeprefix(BLANK)
        return [first, *rest] if first else rest

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        """The ids with `<s>` where the original has it."""
        start, image = [self.bos_token_id], self.convert_tokens_to_ids(IMAGE)
        if token_ids_1 is not None:
            raise ValueError("mPLUG-Owl2 reads one text, not pairs")
        if not token_ids_0 or token_ids_0[0] != image:
            return start + token_ids_0
        pairs = pairwise([image, *token_ids_0])
        return [i for before, now in pairs for i in (start * (before == image != now) + [now])]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens, with a blank before special ones unless they are the first or follow each other."""
        text, known, special = "", set(self.all_special_tokens), True
        ordinary: list[str] = []
        for token in tokens:
            if token not in known:
                ordinary.append(token)
                special = False
                continue
            text += ("" if special else " ") + self.sp_model.decode(ordinary) + token
            ordinary, special = [], True
        return text + self.sp_model.decode(ordinary)


__all__ = ["MPLUGOwl2Tokenizer"]
