"""Answers of which there are only a few: yes or no, and the options of a question."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from svl.evaluation.reading.form import BE, Line, bare, first_line, same_answer, without_markup

LETTERS = "ABCDEFGHIJ"
RUNNING_ON = "BCDEFGHJ"  # which are no words by themselves

# ---------------------------------------------------------------------------------------------- yes or no

_ADVERB = (
    r"(?:(?:most\ likely|absolutely|certainly|clearly|definitely|likely|obviously|of\ course|oh|probably)\s*,?\s+)?"
)
_YES_NO = re.compile(
    rf"""(?:\(?[a-z\d][.):]\s*)?\W*(?:an?\s+)?{_ADVERB}
        (?:(?P<yes>yes|yeah|yep|yup)\b|(?P<no>no|nope|nah)\b|(?P<initial>[yn])\W*$)(?P<rest>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
_NOT_NO = re.compile(r"\s+(?:one|idea|clue|answer|image|information)\b|\.?\s*\d|-\w", re.IGNORECASE)  # "No. 5"
_BOTH = re.compile(  # "yes or no", "No, yes there is"; not "Yes, no doubt", nor what runs on: "yes no", "Yes. No."
    r"""\s*(?:[,;/|&–—-]\s*(?:or\b|and\b)?|or\b|and\b)\W*(yes|no)\b(?=\W*$|\s*[,.;:!?/|]|\s+(?:there|it|is|or|and|yes|no)\b)""",
    re.VERBOSE | re.IGNORECASE,
)
_SAYS_YES_NO = re.compile(
    rf"\b(?:answer|response)\s*(?:\s{BE}\s*:?|:)\W*(yes|no)\b(?!\s+or\b|/)", re.VERBOSE | re.IGNORECASE
)


def read_yes_no(text: str) -> str | None:
    """ "yes" or "no" if the answer starts with that word, or says that it is the answer; None of both, or neither."""
    line = first_line(text)
    if match := _YES_NO.match(line.text):
        word, rest = "yes" if match["yes"] or match["initial"] in ("y", "Y") else "no", match["rest"]
        both = _BOTH.match(rest)
        if both and both[1].lower() != word:
            return None
        is_in_sentence = line.follows_verb and re.match(r"\s+\w", rest)  # "It is no wonder"
        return None if is_in_sentence or (word == "no" and _NOT_NO.match(rest)) else word
    said = {word.lower() for word in _SAYS_YES_NO.findall(without_markup(text))}
    return said.pop() if len(said) == 1 else None


# ------------------------------------------------------------------------------------------------- options

_LETTER = re.compile(
    rf"""(?:\d+[.)]\s+)?{_ADVERB}(?:(?:option|choice|answer|letter)\b\s*:?\s*)?["'(\[{{*]*\s*
        (?P<letter>[A-Z])(?![\w'’+#])\s*(?P<close>["')\]}}*]*)(?P<rest>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
# what may stand behind a letter that is no word: an end, a mark (not that of "A.M."), or what says so
_APART = re.compile(
    r"""\s*$|[)\]},;!?]|[/|](?!\w)|[.:](?![A-Za-z](?:\W|$))|\s*[:;,.](?:\s|$)|\s*(?:[–—=]|-+>|-\s)
        |\s*(?:because|since)\b
        |\s*is\s+(?:the\s+|my\s+)?(?:most\s+)?(?:correct|right|best|true|answer|accurate|likely|appropriate)\b""",
    re.VERBOSE | re.IGNORECASE,
)
# an answer that runs on ("B at 2"): not "A red one" and "I think", nor what denies ("B is wrong") or lists ("B C D")
_RUNS_ON = re.compile(
    r"\s+(?!(?:and|or|vs|to)\b|[A-J]\s+[A-J]\b)\w(?!.*(?:\bnot\b|n['’]t\b|\bwrong\b|\bincorrect\b|\bfalse\b))"
)
_NEXT_LETTER = re.compile(  # of "A, B", "A or B", not that of "B. A dog"
    r"\s*(?:[^\w\s]\W*(?:(?:or|and)\b\W*)?|(?:or|and)\b\W*)([A-J])(?![\w'’])(?=\s*(?:[^\w\s]|or\b|and\b|[A-J]\b(?!')|$))"
)
_LABEL = re.compile(r"(?<![\w'’])\(?([A-J])[.):]\s*\S")
_SAYS_LETTER = re.compile(
    rf"""\b(?i:answer|option|choice)\b(?i:\s+{BE}|\s*[:=])?\s*(?i:(?:option|choice|letter)\s+)?[(\["'*]*
        ([A-J])(?![\w'’])[)\]"'*]*
        (?=\s*(?:$|[.,;:!?\n]|(?i:because|since)\b|(?i:is\s+(?:the\s+)?(?:correct|right|best))))""",
    re.VERBOSE,
)


def read_choice(text: str, options: Mapping[str, Any]) -> str | None:
    """The letter of `options` (letter -> text, None where that is not known) that an answer chooses, else None.

    It may be a letter that stands apart, a sentence that says so, or exactly one option's text.
    """
    if len(bare(text)) > 1 and (same := _option_of_text(text, options)):  # which may itself begin with "It is"
        return same
    line, plain = first_line(text), without_markup(text)
    if letter := _letter_of_line(line, options):
        return None if _lists_options(plain, letter, options) else letter
    named = set(_SAYS_LETTER.findall(plain)) & set(options)
    if len(named) == 1:
        return named.pop()
    return _option_of_text(line.text, options) or _option_of_sentence(line.text, options)


def _letter_of_line(line: Line, options: Mapping[str, Any]) -> str | None:
    """The letter that a line begins with, if it is no word of a sentence and not one of several."""
    match = _LETTER.match(line.text)
    if match is None or match["letter"].upper() not in options:
        return None
    letter, rest = match["letter"].upper(), match["rest"]
    behind = rest.strip(" .:,;()-–—=>")
    if behind and options[letter] is not None and same_answer(behind, str(options[letter])):
        return letter
    if match["letter"] in "ai" and line.follows_verb and not match["close"]:
        return None  # "It is a", cut off
    runs_on = match["letter"] in RUNNING_ON and _RUNS_ON.match(match.string, match.end("letter"))
    if not (match["close"] or _APART.match(rest) or runs_on):
        return None
    following = _NEXT_LETTER.match(rest)
    others = {*_LABEL.findall(rest), *([following[1]] if following else [])}
    return None if others & set(options) - {letter} else letter


def _lists_options(text: str, letter: str, options: Mapping[str, Any]) -> bool:
    """Whether a text labels one option in its first line and another one in the next: a list, not a choice."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    labels = [match[1] if (match := _LABEL.match(line)) else None for line in lines[:2]]
    return len(labels) == 2 and labels[0] == letter and labels[1] in set(options) - {letter}


def _option_of_text(text: str, options: Mapping[str, Any]) -> str | None:
    """The one option that has this text."""
    same = [letter for letter, option in options.items() if option is not None and same_answer(text, str(option))]
    return same[0] if bare(text) and len(same) == 1 else None


def _option_of_sentence(text: str, options: Mapping[str, Any]) -> str | None:
    """The one option that a sentence begins with ("Green, as ...") or says that something is ("The leaf is green")."""
    said = bare(text)
    texts = {letter: re.escape(bare(str(option))) for letter, option in options.items() if option is not None}
    named = [letter for letter, option in texts.items() if option and re.search(rf"(?<!\w){option}(?!\w)", said)]
    if len(named) != 1:
        return None
    option = texts[named[0]]
    says_so = re.compile(rf"{option}\s*[.,;:!(].*|.*\b{BE}\s+(?:an?\s+|the\s+)?{option}", re.VERBOSE)
    return named[0] if says_so.fullmatch(said) else None
