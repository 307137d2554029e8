"""Whether a sentence denies or doubts what it names: "I don't think it is B", "B is wrong", "If it is a dog"."""

from __future__ import annotations

import re

from svl.evaluation.reading.form import BE

_SENTENCE = re.compile(r"[.!?;\n]")
_CLAUSE = re.compile(r",|\b(?:so|but|therefore|thus|hence)\b", re.IGNORECASE)
_CERTAIN = re.compile(r"\b(?:no|without(?:\s+an?y?)?)\s+(?:doubt|question)\b", re.IGNORECASE)
_CONDITION = re.compile(  # not "If I had to choose"
    r"\s*(?:if\b(?!\s+(?:i|we|you)\s+(?:had|have|were|must|ask)\b)|whether\b|unless\b|assuming\b|suppose\b)",
    re.IGNORECASE,
)
_REST_OF_QUESTION = re.compile(r"[^.!;\n]*\?")
_DOUBTED = re.compile(
    r"""\b(?:doubt|unsure|uncertain|unlikely|impossible|if|whether)\b
        |(?:n['’]t|\bnot|\bnever|\bcannot)\s+(?:\w+ly\s+)?(?:sure|certain|clear|convinced|think|believe|say|agree|know|tell|likely|possible|true)\b""",
    re.VERBOSE | re.IGNORECASE,
)
_DENIED = re.compile(  # right before what is named: "not option", "isn't the", "can't be a", "no"
    r"""(?:n['’]t|\b(?:not|no|never|cannot|neither|nor|except|excluding))\s+
        (?:(?:be|option|choice|answer|letter|an?|the|my)\s+)*\W*$""",
    re.VERBOSE | re.IGNORECASE,
)
_BEHIND = re.compile(
    rf"""[\s,]*(?:(?:which|that|option|choice|answer)\s+)*
        (?:(?:is|are|was|were|do|does|did|could|would|should|might|must|has|have)(?:n['’]t|\s+not)\b
        |(?:can|won)['’]t\b|(?:can|will|may)\s+not\b|cannot\b|never\b|no\W*$
        |(?:[–—-]\s*|{BE}\s+|seems?\s+|looks?\s+)?(?:\w+ly\s+)?
            (?:wrong|incorrect|false|impossible|unlikely|not\s+(?:correct|right|true|likely|possible))\b)""",
    re.VERBOSE | re.IGNORECASE,
)


def is_denied(text: str, start: int, end: int) -> bool:
    """Whether what stands at `text[start:end]` is denied, doubted, or asked for where it stands.

    That is, by a word right before it, by a doubt in its clause, by the sentence being a condition or a question, or by
    what follows directly. "It is not a cat, so the answer is B", "B, not A" and "B, it is not A" do not deny B.
    """
    before = _SENTENCE.split(text[:start])[-1]
    if _CONDITION.match(before) or (before.strip() and _REST_OF_QUESTION.match(text[end:])):
        return True
    clause = _CLAUSE.split(_CERTAIN.sub("", before))[-1]
    return bool(_DOUBTED.search(clause) or _DENIED.search(clause)) or is_denied_behind(text[end:])


def is_denied_behind(rest: str) -> bool:
    """Whether what goes on like this denies what stood before it: " is wrong", ", which can't be"."""
    return bool(_BEHIND.match(rest))
