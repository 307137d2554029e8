"""Qwen's byte-pair encoding, read from the original vocabulary file `qwen.tiktoken`.

It is what the library tiktoken computes, without the library: the text is cut into words, and in each, the neighbours
that make the lowest token are merged until none do. Its name is the one that original checkpoints give, so that
transformers finds it and not the code that comes with them.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
from transformers import AddedToken, PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

FILES = {"vocab_file": "qwen.tiktoken"}
# contractions | letters, after at most one other character | one digit | other characters | lines | blanks
WORDS = regex.compile(
    r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"
CONTROL = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
MARKS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
SHOWN = bytes_to_unicode()  # byte -> printable character: how tokens that are no whole characters are written
BYTES = {character: byte for byte, character in SHOWN.items()}


class QWenTokenizer(PreTrainedTokenizer):
    """Text to tokens and back, for Qwen-VL.

    Text is normalised to NFC. Control tokens and marks of images, boxes and references are recognised wherever they
    are in the text. Nothing is added at the start or the end; padding is `<|endoftext|>`.

    Args:
        vocab_file: lines "<token in base64> <rank>"; ids are ranks, followed by those of the special tokens.
        errors: what becomes of bytes that are no UTF-8 when decoding, as in `bytes.decode`.

    Raises:
        ValueError: if the file is no such vocabulary.
    """

    vocab_files_names = FILES
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, errors: str = "replace", **kwargs: Any):
        try:
            lines = [line.split() for line in Path(vocab_file).read_bytes().splitlines() if line]
            self.ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"'{vocab_file}' is no tiktoken vocabulary: {error}") from error
        missing = [byte for byte in range(256) if bytes([byte]) not in self.ranks]
        if missing or sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise ValueError(f"'{vocab_file}' is no whole vocabulary: ranks have gaps, or single bytes are missing")
        self.errors = errors
        self.special = {token: len(self.ranks) + i for i, token in enumerate((*CONTROL, *MARKS))}
        self.ids = {"".join(map(SHOWN.__getitem__, token)): rank for token, rank in self.ranks.items()} | self.special
        self.tokens = {i: token for token, i in self.ids.items()}
        self._added_tokens_decoder = {
            i: AddedToken(token, special=True, normalized=False) for token, i in self.special.items()
        }
        kwargs.pop("added_tokens_decoder", None)  # of a saved tokenizer; they are known
        kwargs.pop("auto_map", None)  # code that comes with original checkpoints
        # files that others saved ask for spaces to be cleaned up; the original code never does that
        kwargs = {"pad_token": END, "eos_token": END, **kwargs, "clean_up_tokenization_spaces": False}
        super().__init__(errors=errors, **kwargs)
        self._update_trie()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id; bytes outside whole characters are written as GPT-2 does."""
        return dict(self.ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """Control tokens and marks: what decoding leaves out on request."""
        return list(self.special)

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return list(self.special.values())

    def __len__(self) -> int:
        return len(self.ids)

    def prepare_for_tokenization(self, text: str, is_split_into_words: bool = False, **kwargs: Any) -> Any:
        """The whole text in NFC: a mark may combine with the character before it."""
        return unicodedata.normalize("NFC", text), kwargs

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.tokens[rank] for word in WORDS.findall(text) for rank in self._merge(word.encode())]

    def _merge(self, word: bytes) -> list[int]:
        """Ranks of the tokens of a word: of all neighbours, the ones that make the lowest token merge first."""
        if word in self.ranks:
            return [self.ranks[word]]
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            made = [self.ranks.get(a + b, len(self.ranks)) for a, b in pairwise(parts)]
            best = min(range(len(made)), key=made.__getitem__)
            if made[best] == len(self.ranks):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [self.ranks[part] for part in parts]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokens.get(index, "")  # the model's vocabulary is larger than the tokenizer's

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens; bytes that are no UTF-8 become what `errors` says."""
        parts = (t.encode() if t in self.special else bytes(map(BYTES.__getitem__, t)) for t in tokens)
        return b"".join(parts).decode("utf-8", self.errors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `qwen.tiktoken` as it was read."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        file = Path(save_directory, prefix + FILES["vocab_file"])
        lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in self.ranks.items())
        file.write_bytes(b"".join(lines))
        return (str(file),)


__all__ = ["QWenTokenizer"]
