"""Answers to yes-or-no questions."""

from __future__ import annotations

import re

from svl.evaluation.reading.denial import is_denied
from svl.evaluation.reading.form import ADVERB, BE, first_line, without_markup, written_lines

_CHINESE = {
    **dict.fromkeys(("是", "是的", "有", "对", "正确"), "yes"),
    **dict.fromkeys(("否", "不是", "没有", "不", "不对"), "no"),
}

# "(Yes/No) ", "Please answer yes or no. ": the question's words, in front of an answer
_ASKED = re.compile(
    r"""\W*(?:(?:please\s+)?(?:answer|reply|respond)\s+(?:with\s+)?(?:only\s+)?)?
        \(?(?:yes\s*(?:/|or)\s*no|no\s*(?:/|or)\s*yes)\b(?:\s+question\b)?\s*[).,:?!–—-]*\s*(?=[\w(])""",
    re.VERBOSE | re.IGNORECASE,
)
_YES_NO = re.compile(
    rf"""(?:\(?[a-z\d][.):]\s*)?\W*(?:an?\s+)?{ADVERB}
        (?:(?P<yes>(?:yes)+|yeah|yep|yup)\b|(?P<no>(?:no)+|nope|nah)\b|(?P<initial>[yn])\W*$)(?P<rest>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
_NOT_NO = re.compile(  # "No one", "No doubt", "No. 5"
    r"\s+(?:one|idea|clue|answer|image|information|doubt|wonder|question|problem|matter)\b|\.?\s*\d|-\w", re.IGNORECASE
)
_BOTH = re.compile(  # "yes or no", "No, yes there is"; not "Yes, no doubt", nor what runs on: "yes no", "Yes. No."
    r"""\s*(?:[,;/|&–—-]\s*(?:or\b|and\b)?|or\b|and\b)\W*(yes|no)\b
        (?=\W*$|\s*[,.;:!?/|]|\s+(?:there|it|is|or|and|yes|no|question)\b)""",
    re.VERBOSE | re.IGNORECASE,
)
_LISTED = re.compile(  # a menu's second entry: "(A) Yes (B) No", "Yes: 1, No: 0"
    r"(?:\(?\b[a-z\d]\s*[.):]\s*|[,;/|]\s*)(yes|no)\s*(?:[:=(]|\W*$)", re.IGNORECASE
)
_SAYS = re.compile(rf"\b(?:answer|response)\s*(?:\s{BE}\s*:?|:)\W*(yes|no)\b(?!\s+or\b|/)", re.VERBOSE | re.IGNORECASE)


def read_yes_no(text: str) -> str | None:
    """ "yes" or "no" if the answer starts with that word, or says that it is the answer; None of both, or neither."""
    line, plain = first_line(text), without_markup(text)
    if chinese := _CHINESE.get(re.split("[,.!]", line.text, maxsplit=1)[0]):
        return chinese
    match = _YES_NO.match(_ASKED.sub("", line.text, count=1))
    if match is None:
        said = {found[1].lower() for found in _SAYS.finditer(plain) if not is_denied(plain, *found.span(1))}
        return said.pop() if len(said) == 1 else None if said else _last_line(plain)
    word, rest = "yes" if match["yes"] or match["initial"] in ("y", "Y") else "no", match["rest"]
    both = _BOTH.match(rest) or _LISTED.search(rest)
    if both and both[1].lower() != word:
        return None
    is_in_sentence = line.follows_verb and re.match(r"\s+\w", rest)  # "It is no wonder"
    return None if is_in_sentence or (word == "no" and _NOT_NO.match(rest)) else word


def _last_line(text: str) -> str | None:
    """The "yes" or "no" that stands alone in the last of several lines."""
    lines = written_lines(text)
    found = re.fullmatch(r"\W*(yes|no)\W*", lines[-1], re.IGNORECASE) if len(lines) > 1 else None
    return found[1].lower() if found else None
