"""Answers in one's own words: short ones, and numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

from svl.evaluation.reading.form import BE, bare, first_line

_TO_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve"
_DIGITS = {word: str(number) for number, word in enumerate(_TO_TWELVE.split())}
# what may stand before a number: words without digits that end so
_TO_NUMBER = re.compile(
    rf"[^\d\n]{{0,80}}?(?:\b{BE}|there['’](?:s|re)|\bequals?|\btotal\ of|[:=])\s+", re.VERBOSE | re.IGNORECASE
)
_NUMBER = re.compile(
    r"""(?:(?:about|approximately|around|roughly|nearly|almost|exactly|only|approx\.|~|≈)\s*)*
        (?P<sign>[-+−]?)\s*(?P<currency>[$€£¥]?)\s*
        (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e(?P<power>[-+]?\d{1,2}))?\s*(?P<unit>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
_UNIT = re.compile(  # without digits, and without words that join or multiply numbers
    r"(?!(?:or|to|and|hundred|thousand|million|billion|trillion|[kmb]n?)\b)[^\W\d_]\D*|[%°²³]\D*|\W*",
    re.IGNORECASE,
)


class Number(NamedTuple):
    """A number and its unit as written, in lower case ("%", "$", "people"); empty where there is none."""

    value: float
    unit: str = ""


def read_short_answer(text: str) -> str | None:
    """What an answer says, in its own letters: "red" of `The answer is: **red**.`; None of an empty one."""
    line = first_line(re.sub(r"^\s*A\s*:\s*(?=\S)", "", text)).text
    return line.removesuffix(".").rstrip() or None


def read_word(text: str) -> str | None:
    """The first word of a short answer that should be one ("red" of `a red circle`); None of two: `red or blue`."""
    found = re.match(
        r"(?:(?:an?|the)\s+)?(\w[\w.'’-]*)(?!\s*(?:[,/&]|or\b|and\b))(?!\w)",
        read_short_answer(text) or "",
        re.IGNORECASE,
    )
    return found[1].rstrip(".") if found else None


def read_number(text: str) -> Number | None:
    """The one number that an answer gives, as digits or (up to twelve) as a word."""
    answer = re.sub(r"[A-Za-z]+", lambda word: _DIGITS.get(word[0].lower(), word[0]), read_short_answer(text) or "")
    lead = _TO_NUMBER.match(answer)
    match = _NUMBER.match(answer, lead.end() if lead else 0)
    if match is None or not _UNIT.fullmatch(match["unit"].strip()):
        return None
    value = float(match["digits"].replace(",", "")) * 10 ** int(match["power"] or 0)
    unit = re.sub(r"^percent\b.*", "%", bare(match["unit"])) or match["currency"]
    return Number(-value if match["sign"] in ("-", "−") else value, unit)
