"""Answers in one's own words: short ones, and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from svl.evaluation.reading.form import BE, bare, first_line, without_markup, written_lines

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
_MULTIPLES = r"""hundred|thousand|million|mil|mill|mio|mln|mn|milliard|mlrd|mrd|billion|bil|bln|bn|trillion|tril|trn|tn
    |dozen|lakh|crore"""
LETTERS_OF_MULTIPLES = tuple("kmbt")  # or units: metres, tonnes
_CHINESE = "[十百千万萬亿億]"
_UNIT = re.compile(  # without digits, and without words that join or multiply numbers
    rf"(?!(?:or|to|and|(?:{_MULTIPLES})s?|[kmb]n)\b|{_CHINESE})[^\W\d_]\D*|[%°²³]\D*|\W*",
    re.IGNORECASE | re.VERBOSE,
)
_ONE_LETTER = re.compile(rf"([{''.join(LETTERS_OF_MULTIPLES)}])\b", re.IGNORECASE)
_UNIT_BEHIND = re.compile(r"\d\s*([^\W\d_]+)")


SENTENCE = 4  # words from which on a first line may be reasoning
_CONCLUDES = re.compile(
    r"\W*(?:(?:so|thus|hence|therefore|then)\b\s*,?\s*)?(?:the\s+)?(?:(?:final|correct|right)\s+)?answer\s*(?:is\b|:)",
    re.IGNORECASE,
)
_GOES_ON = "it|its|which|that|this|as|because|since|there|but|not"  # behind "red,"


class Number(NamedTuple):
    """A number and its unit as written, in lower case ("%", "$", "people"); empty where there is none."""

    value: float
    unit: str = ""


def read_short_answer(text: str) -> str | None:
    """What an answer says, in its own letters: "red" of `The answer is: **red**.`; None of an empty one."""
    line = first_line(_conclusion(text) or re.sub(r"^\s*A\s*:\s*(?=\S)", "", text)).text
    return line.removesuffix(".").rstrip() or None


def _conclusion(text: str) -> str | None:
    """What a text says from the later line on that gives its answer, if the first is a sentence; None of two such."""
    lines = written_lines(without_markup(text))
    if len(lines) < 2 or len(lines[0].split()) < SENTENCE or _CONCLUDES.match(lines[0]):
        return None
    rests = ["\n".join(lines[i:]) for i in range(1, len(lines)) if _CONCLUDES.match(lines[i])]
    said = {bare(first_line(rest).text): rest for rest in rests}
    return said.popitem()[1] if len(said) == 1 else None


def read_word(text: str) -> str | None:
    """The first word of a short answer that should be one ("red" of `a red circle`); None of two: `red or blue`."""
    found = re.match(
        rf"(?:(?:an?|the)\s+)?(\d{{1,3}}(?:,\d{{3}})+(?![\w,])|\w[\w.'’-]*)(?!\s*(?:,(?!\s*(?:{_GOES_ON})\b)|[/&]|or\b|and\b))(?!\w)",
        read_short_answer(text) or "",
        re.IGNORECASE,
    )
    return found[1].rstrip(".") if found else None


def read_number(text: str, known: Iterable[str] = ()) -> Number | None:
    """The one number that an answer gives, as digits or (below a hundred) in words; None of one that is multiplied.

    "12 m" may be 12 metres or 12 million: a single letter is a unit only if one of the `known` texts (the options, or
    what is right) has it, or a unit that begins with it, behind a number.
    """
    answer = _HEDGE.sub("", _WORDS.sub(_in_digits, read_short_answer(text) or ""))
    lead = _TO_NUMBER.match(answer)
    match = _NUMBER.match(answer, lead.end() if lead else 0)
    if match is None or not _UNIT.fullmatch(match["unit"].strip()):
        return None
    letter = _ONE_LETTER.match(match["unit"])
    if letter and letter[1] not in _initials_of_units(known):
        return None
    value = float(match["digits"].replace(",", "")) * 10 ** int(match["power"] or 0)
    unit = re.sub(r"^percent\b.*", "%", bare(match["unit"])) or match["currency"]
    is_negative = bool(match["inner"]) or match["sign"] not in (None, "", "+")
    return Number(-value if is_negative else value, unit)


def _initials_of_units(texts: Iterable[str]) -> set[str]:
    """With which letters units behind numbers begin."""
    units = (unit for text in texts for unit in _UNIT_BEHIND.findall(text))
    return {unit[0] for unit in units if len(unit) == 1 or _UNIT.fullmatch(unit)}


def _in_digits(words: re.Match[str]) -> str:
    """A number in words, below a hundred, in digits."""
    if words["one"]:
        return str(_ONE[words["one"].lower()])
    return str(10 * _TEN[words["ten"].lower()] + _ONE[(words["unit"] or "zero").lower()])
