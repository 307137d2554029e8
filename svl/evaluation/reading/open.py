"""Answers in one's own words: short ones, and numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

from svl.evaluation.reading.form import BE, bare, first_line

_ONES = "zero one two three four five six seven eight nine ten eleven twelve"
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ONE = {word: number for number, word in enumerate(f"{_ONES} {_TEENS}".split())}
_TEN = {word: number for number, word in enumerate(_TENS.split(), 2)}
_WORDS = re.compile(
    rf"\b(?:(?P<ten>{'|'.join(_TEN)})(?:[\s-]+(?P<unit>{'|'.join(list(_ONE)[1:10])}))?|(?P<one>{'|'.join(_ONE)}))\b",
    re.IGNORECASE,
)
# what may stand before a number: words without digits that end so
_TO_NUMBER = re.compile(
    rf"""[^\d\n]{{0,80}}?(?:(?:\b{BE}|there['’](?:s|re)|\bequals?|\btotal\ of)\s+|[:=]\s*)
        |i\s+(?:can\s+)?(?:count|counted|see)\s+""",
    re.VERBOSE | re.IGNORECASE,
)
_NUMBER = re.compile(
    r"""(?:(?:about|approximately|around|roughly|nearly|almost|exactly|only|approx\.|~|≈)\s*)*
        (?P<sign>[-+−–]|(?:minus|negative)\b)?\s*(?P<currency>[$€£¥₹]?)\s*(?P<inner>[-−–]?)
        (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e(?P<power>[-+]?\d{1,2}))?\s*
        (?P<unit>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
_HEDGE = re.compile(r"\s*(?:\bor\s+so|\(?\b(?:approx\w*|about|estimated))\b[.)]*$", re.IGNORECASE)  # behind a number
_MULTIPLES = r"hundred|thousand|million|mil|mio|mn|billion|bn|trillion|dozen|lakh|crore|[kmb]n?"
_UNIT = re.compile(  # without digits, and without words that join or multiply numbers
    rf"(?!(?:or|to|and|(?:{_MULTIPLES})s?)\b)[^\W\d_]\D*|[%°²³]\D*|\W*",
    re.IGNORECASE,
)


_GOES_ON = "it|its|which|that|this|as|because|since|there|but|not"  # behind "red,"


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
        rf"(?:(?:an?|the)\s+)?(\w[\w.'’-]*)(?!\s*(?:,(?!\s*(?:{_GOES_ON})\b)|[/&]|or\b|and\b))(?!\w)",
        read_short_answer(text) or "",
        re.IGNORECASE,
    )
    return found[1].rstrip(".") if found else None


def read_number(text: str) -> Number | None:
    """The one number that an answer gives, as digits or (below a hundred) in words."""
    answer = _HEDGE.sub("", _WORDS.sub(_in_digits, read_short_answer(text) or ""))
    lead = _TO_NUMBER.match(answer)
    match = _NUMBER.match(answer, lead.end() if lead else 0)
    if match is None or not _UNIT.fullmatch(match["unit"].strip()):
        return None
    value = float(match["digits"].replace(",", "")) * 10 ** int(match["power"] or 0)
    unit = re.sub(r"^percent\b.*", "%", bare(match["unit"])) or match["currency"]
    is_negative = bool(match["inner"]) or match["sign"] not in (None, "", "+")
    return Number(-value if is_negative else value, unit)


def _in_digits(words: re.Match[str]) -> str:
    """A number in words, below a hundred, in digits."""
    if words["one"]:
        return str(_ONE[words["one"].lower()])
    return str(10 * _TEN[words["ten"].lower()] + _ONE[(words["unit"] or "zero").lower()])
