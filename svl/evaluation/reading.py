"""Reading an answer: the one place where what a model wrote becomes a word, a letter or nothing.

| reader | reads | from | not from |
|---|---|---|---|
| `read_yes_no` | "yes" or "no" | an answer that starts with it: `Yes.`, `yes, there is`, `"no"` | `yesterday`, `not` |
| `read_letter` | a letter | a letter alone or before `) . : ,`: `b`, `B.`, `(B)`, `B. red` | `A red one`, `Both` |
| `read_choice` | an option's letter | the same, `The answer is B.`, the text of one option only | `A or B` |
| `normalise` | all of the text | any answer: lower case, white space and one final period removed | |

A reader gives None for what it cannot read, never a guess: such an answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_LETTER = re.compile(r"\s*\(?\s*([A-Z])\s*(?:[).:,]|$)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\b(?i:answer|option|choice)\b(?:\s+is|\s*:)?\s*\(?([A-J])\b(?!')")


def read_yes_no(text: str) -> str | None:
    """ "yes" or "no" if the answer starts with that word ("Yes.", "yes, there is"), else None."""
    match = _YES_NO.match(text)
    return match[1].lower() if match else None


def read_letter(text: str) -> str | None:
    """The letter of "B", "B.", "(B)" or "B. red", upper case, else None ("a red one" is an article, not an option)."""
    match = _LETTER.match(text)
    return match[1].upper() if match else None


def read_choice(text: str, options: Mapping[str, Any]) -> str | None:
    """The letter of `options` (letter -> text) that an answer chooses, else None.

    It may be the letter ("B", "B.", "(B)", "B. red"), a sentence that says so ("The answer is B"), or exactly one
    option's text.
    """
    letter = read_letter(text)
    if letter in options:
        return letter
    named = set(_ANSWER_IS.findall(text))
    if len(named) == 1 and named <= set(options):
        return named.pop()
    same = [letter for letter, option in options.items() if option and normalise(str(option)) == normalise(text)]
    return same[0] if len(same) == 1 else None


def normalise(text: str) -> str:
    """Lower case, without surrounding white space and the final period."""
    return text.strip().removesuffix(".").rstrip().lower()
