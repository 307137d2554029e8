"""Whether a sentence denies or doubts what it names: "I don't think it is B", "B is wrong", "If it is a dog"."""

from __future__ import annotations

import re

from svl.evaluation.reading.form import BE

_SENTENCE = re.compile(r"[.!?;\n]")
_CLAUSE = re.compile(r",|\b(?:so|but|therefore|thus|hence)\b", re.IGNORECASE)
_CERTAIN = re.compile(r"\b(?:no|without(?:\s+an?y?)?)\s+(?:doubt|question)\b|\bnot\s+only\b", re.IGNORECASE)
_CONDITION = re.compile(r"\s*(?:if|whether|unless|assuming|suppose)\b", re.IGNORECASE)
_REST_OF_QUESTION = re.compile(r"[^.!;\n]*\?")
_BEFORE = re.compile(
    r"n['’]t\b|\b(?:not|no|cannot|never|neither|nor|doubt|unsure|unlikely|impossible|if|whether|except|excluding)\b",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    rf"""[\s,]*(?:(?:which|that|it|this|option|choice|answer)\s+)*
        (?:(?:is|are|was|were|do|does|did|could|would|should|might|must|has|have)(?:n['’]t|\s+not)\b
        |(?:can|won)['’]t\b|(?:can|will|may)\s+not\b|cannot\b|never\b|no\W*$
        |(?:[–—-]\s*|{BE}\s+|seems?\s+|looks?\s+)?(?:\w+ly\s+)?
            (?:wrong|incorrect|false|impossible|unlikely|not\s+(?:correct|right|true|likely|possible))\b)""",
    re.VERBOSE | re.IGNORECASE,
)


def is_denied(text: str, start: int, end: int) -> bool:
    """Whether what stands at `text[start:end]` is denied, doubted, or asked for where it stands.

    That is, by a word before it in its clause, by the sentence being a condition or a question, or by what follows
    directly. "It is not a cat, so the answer is B" and "B, not A" do not deny B.
    """
    before = _SENTENCE.split(text[:start])[-1]
    if _CONDITION.match(before) or (before.strip() and _REST_OF_QUESTION.match(text[end:])):
        return True
    clause = _CLAUSE.split(_CERTAIN.sub("", before))[-1]
    return bool(_BEFORE.search(clause)) or is_denied_behind(text[end:])


def is_denied_behind(rest: str) -> bool:
    """Whether what goes on like this denies what stood before it: " is wrong", ", which can't be"."""
    return bool(_BEHIND.match(rest))
