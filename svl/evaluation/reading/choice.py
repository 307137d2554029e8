"""Answers to questions with lettered options."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from svl.evaluation.reading.denial import is_denied, is_denied_behind
from svl.evaluation.reading.form import ADVERB, BE, Line, bare, first_line, normalise, same_answer, without_markup
from svl.evaluation.reading.open import read_number

LETTERS = string.ascii_uppercase
WORDS = "AI"  # letters that are words by themselves

_LETTER = re.compile(
    rf"""(?:\d+[.)]\s+)?{ADVERB}(?:(?:the\s+)?(?:option|choice|answer|letter)\b\s*:?\s*)?["'(\[{{*]*\s*
        (?P<letter>[A-Z])(?![\w'’+#])\s*(?P<close>["')\]}}*]*)(?P<rest>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
_REPEATED = re.compile(r"\W*([A-Z])(?:\W*\1)+\W*")  # "B B B"
_IS_RIGHT = r"is\s+(?:the\s+|my\s+)?(?:most\s+)?(?:correct|right|best|true|answer|accurate|likely|appropriate)\b"
# what may stand behind a letter that is no word: an end, a mark (not that of "A.M."), or what says so
_APART = re.compile(
    rf"""\s*$|[)\]}},;!?]|[/|](?!\w)|[.:](?![A-Za-z](?:\W|$))|\s*[:;,.](?:\s|$)|\s*(?:[–—=]|-+>|-\s)|\s*[(\[]
        |\s*(?:because|since)\b|\s*{_IS_RIGHT}|\s*(?:and\s+)?(?:not|instead\s+of|rather\s+than)\s+\(?(?-i:[A-Z])\b""",
    re.VERBOSE | re.IGNORECASE,
)
# an answer that runs on ("B at 2"): not "A red one" and "I think", nor what denies ("B is wrong") or lists ("B C D")
_RUNS_ON = re.compile(
    r"\s+(?!(?:and|or|vs|to)\b|[A-Z]\s+[A-Z]\b)\w(?!.*(?:\bnot\b|n['’]t\b|\bwrong\b|\bincorrect\b|\bfalse\b))"
)
_NEXT_LETTER = re.compile(  # of "A, B", "A or B", not that of "B. A dog"
    r"\s*(?:[^\w\s]\W*(?:(?:or|and)\b\W*)?|(?:or|and)\b\W*)([A-Z])(?![\w'’])(?=\s*(?:[^\w\s]|or\b|and\b|[A-Z]\b(?!')|$))"
)
_LABEL = re.compile(r"(?<![\w'’])\(?([A-Z])[.):]\s*\S")
_LABELLED_LINE = re.compile(r"[\s*•#>-]*(?i:(?:option|choice)\s+)?\(?([A-Z])(?:[.):]+|\s+[-–—])\s*\S")
_SAYS = re.compile(
    rf"""\b(?i:answer|option|choice)\b(?i:\s+{BE}|\s*[:=])?\s*(?i:(?:option|choice|letter)\s+)?[(\["'*]*
        ([A-Z])(?![\w'’])[)\]"'*]*
        (?=\s*(?:$|[.,;:!(\[\n]|(?i:because|since|(?:and\s+)?not)\b|(?i:is\s+(?:the\s+)?(?:correct|right|best))))""",
    re.VERBOSE,
)


def read_choice(text: str, options: Mapping[str, Any]) -> str | None:
    """The letter of `options` (letter -> text, None where that is not known) that an answer chooses, else None.

    It may be a letter that stands apart, a sentence that says so, or exactly one option's text.
    """
    if len(bare(text)) > 1 and (same := _option_of_text(text, options)):  # which may itself begin with "It is"
        return same
    line, plain = first_line(text), without_markup(text)
    letter = _letter_of_line(line, options)
    if letter and not _lists_options(plain, letter, options):
        return letter
    said = _letters_said(plain, options)
    if len(said) == 1:
        return said.pop()
    if letter:  # of a list that comes to no end
        return None
    return (
        _option_of_text(line.text, options)
        or _option_with_label(line.text, options)
        or _option_of_sentence(line.text, options)
        or _option_of_number(line.text, options)
    )


# ----------------------------------------------------------------------------------------------- by letter


def _letter_of_line(line: Line, options: Mapping[str, Any]) -> str | None:
    """The letter that a line begins with, if it is no word of a sentence and not one of several."""
    if (repeated := _REPEATED.fullmatch(line.text)) and repeated[1] in options:
        return repeated[1]
    match = _LETTER.match(line.text)
    if match is None or match["letter"].upper() not in options:
        return None
    letter, rest = match["letter"].upper(), match["rest"]
    behind = rest.strip(" .:,;()[]-–—=>")
    own = str(options[letter]) if options[letter] is not None else ""
    if behind and own and same_answer(behind, own):
        return letter
    if match["letter"] in "ai" and line.follows_verb and not match["close"]:
        return None  # "It is a", cut off
    if is_denied_behind(rest) or (own and is_denied_behind(_without_start(behind, own))):
        return None
    runs_on = (
        letter not in WORDS
        and match["letter"].isupper()
        and not _begins_an_option(line.text, options)
        and _RUNS_ON.match(match.string, match.end("letter"))
    )
    if not (match["close"] or _APART.match(rest) or runs_on):
        return None
    following = _NEXT_LETTER.match(rest)
    others = {*_LABEL.findall(rest), *([following[1]] if following else [])}
    return None if others & set(options) - {letter} else letter


def _without_start(text: str, start: str) -> str:
    """What stands behind the words that a text begins with; nothing if it does not."""
    return text[len(start) :] if text.lower().startswith(start.lower()) else ""


def _begins_an_option(text: str, options: Mapping[str, Any]) -> bool:
    """Whether a letter and the word behind it begin the text of an option: "C major" of "C major scale"."""
    words = text.lower().split()[:2]
    return any(str(option).lower().split()[: len(words)] == words for option in options.values() if option is not None)


def _lists_options(text: str, letter: str, options: Mapping[str, Any]) -> bool:
    """Whether a text labels one option in its first line and another one in the next: a list, not a choice."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    labels = [match[1] if (match := _LABELLED_LINE.match(line)) else None for line in lines[:2]]
    if len(labels) == 2 and labels[0] == letter and labels[1] in set(options) - {letter}:
        return True
    return [line.strip("().:") for line in lines[: len(options)]] == list(options)


def _letters_said(text: str, options: Mapping[str, Any]) -> set[str]:
    """The options that a text says to be its answer."""
    said = set()
    for found in _SAYS.finditer(text):
        following = _NEXT_LETTER.match(text[found.end(1) :].partition("\n")[0])
        is_one_of_several = following is not None and following[1] in set(options) - {found[1]}
        if found[1] in options and not is_one_of_several and not is_denied(text, *found.span()):
            said.add(found[1])
    return said


# ------------------------------------------------------------------------------------------------- by text


def _option_of_text(text: str, options: Mapping[str, Any]) -> str | None:
    """The one option that has this text: to the letter, else but for case, else but for an article and marks."""
    for form in (str.strip, normalise, bare):
        if not form(text):
            return None
        same = [letter for letter, option in options.items() if option is not None and form(str(option)) == form(text)]
        if same:
            return same[0] if len(same) == 1 else None
    return None


def _option_with_label(text: str, options: Mapping[str, Any]) -> str | None:
    """The one option whose letter and text a sentence has: "The animal is B. dog"."""
    named = []
    for letter, option in options.items():
        label = rf"(?<!\w)\(?{letter}[.):]\s*{re.escape(str(option).strip())}(?!\w)"
        found = re.search(label, text, re.IGNORECASE) if option is not None and str(option).strip() else None
        if found:
            named.append(None if is_denied(text, *found.span()) else letter)
    return named[0] if len(named) == 1 else None


def _option_of_sentence(text: str, options: Mapping[str, Any]) -> str | None:
    """The one option that a sentence begins with ("Green, as ...") or says that something is ("The leaf is green")."""
    said = bare(text)
    texts = {letter: bare(str(option)) for letter, option in options.items() if option is not None}
    named = [letter for letter, option in texts.items() if option and _has_words(said, option)]
    named = [a for a in named if not any(texts[a] != texts[b] and _has_words(texts[b], texts[a]) for b in named)]
    if len(named) != 1:
        return None
    option = re.escape(texts[named[0]])
    says_so = re.compile(
        rf"(?P<first>{option})(?:\s*[.,;:!(].*|\s+{_IS_RIGHT}.*)|.*\b{BE}\s+(?:an?\s+|the\s+)?(?P<last>{option})",
        re.VERBOSE,
    )
    found = says_so.fullmatch(said)
    if found is None or is_denied(said, *found.span("first" if found["first"] else "last")):
        return None
    return named[0]


def _has_words(text: str, words: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text))


def _option_of_number(text: str, options: Mapping[str, Any]) -> str | None:
    """The one option that is the number which an answer gives, if all options are numbers."""
    said = read_number(text)
    numbers = {letter: read_number(str(option)) for letter, option in options.items() if option is not None}
    if said is None or len(numbers) < len(options):
        return None
    known = {letter: number.value for letter, number in numbers.items() if number is not None}
    same = [letter for letter, value in known.items() if value == said.value]
    return same[0] if len(known) == len(options) and len(same) == 1 else None
