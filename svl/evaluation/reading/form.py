"""The form of an answer, apart from what it says: markup, words that lead to it, what comes after the first line."""

from __future__ import annotations

import html
import re
from typing import NamedTuple

# "is" and its like, which readers look for, too
BE = r"(?:is|was|are|were|(?:would|should|must|will|could|can|may|might|has\ to)\s+be|(?:seems?|appears?)\s+to\s+be)"

_REASONING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|$)", re.DOTALL | re.IGNORECASE)
_RESULT = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_TAG = re.compile(r"<\|[^<>|]*\|>|</?[A-Za-z][^<>]*>|\[/?INST\]")
_FENCE = re.compile(r"```(?:[A-Za-z]+\n)?|`")
_DELIMITER = re.compile(r"\\[()\[\]]|\\(?=[%$])")  # of formulas; of their signs
_COMMAND = re.compile(r"\\(?:text\w*|math\w+|emph|bf|rm)\s*\{(?P<inner>[^{}]*)\}")
_FORMULA = re.compile(r"\$\$?(?=\S)(?P<inner>[^$\n]+?)(?<=\S)\$\$?(?!\d)")  # not the signs of "$5 and $6"
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|~~)(?=\S)(?P<inner>.+?)(?<=\S)\1(?!\w)")
_MARK = re.compile(r"^\s*(?:[-*•>#=→]+\s+|[*_~]+(?=\S))|(?<=\S)[*_~]+\s*$")  # of a list or head; emphasis cut off
_WIDE = str.maketrans("。【】\u00a0", ".[] ", "\u200b\ufeff") | {0xFF01 + i: 0x21 + i for i in range(94)}  # full width
_QUOTES = tuple(zip("\"'“‘«([{", "\"'”’»)]}", strict=True))

_LEADS = [
    re.compile(pattern, re.VERBOSE | re.IGNORECASE)
    for pattern in (
        # "Based on the image, "
        r"""(?:based\ on|according\ to|looking\ at|judging\ from|from|in)\s+(?:the|this)\s+(?:\w+\s+)?
            (?:image|picture|photo|photograph|chart|graph|figure|diagram|table|video|document|context|text|information)\b
            [^,:\n]{0,60}[,:]\s*""",
        # "Assistant: ", "Sure! ", "So " before what leads on
        r"assistant\s*[:\n]\s*",
        r"(?:sure|well|ok|okay|hmm|certainly|of\ course)\s*[,!:.]\s*(?=\S)",
        r"(?:(?:so|thus|hence|therefore|then|and)\s*,?\s+|a\s*:\s*)(?=(?:the|my|it|i|answer|option)\b)",
        # "The answer (to the question) is ", "Answer: ", "Here is my final answer - "
        rf"""(?:here(?:['’]s|\s+is)\s+)?(?:(?:the|my|our|your)\s+)?
            (?:(?:final|correct|right|best|short|single|most|likely|possible|probable|appropriate|suitable|accurate|predicted)\s+)*
            (?:answer|ans|option|choice|response|reply|letter|result|solution|output|prediction|conclusion|答案)\s*
            (?:\s(?:to|for|of|in|here|from)\b[^:.,;=\n]{{0,80}}?)?\s*
            (?:\b{BE}\b(?:\s+that)?|(?=[:=]|-+>|[–—-]\s))\s*[*_]*\s*(?:[:=]+|[-=]+>|→|[–—-](?=\s))?[*_]*\s*""",
        # "It is ", "I think (that) "
        rf"(?:it|this|that)\s*(?:['’]s|\s{BE})\b\s*:?\s*",
        r"""(?:i|we)\s*(?:['’](?:d|ll|m)|\s+(?:would|will|am))?\s*
            (?:think|believe|guess|suppose|say|choose|chose|select|pick|go(?:ing)?\ with)\b(?:\s+that\b)?\s*[,:]?\s*""",
    )
]
MOST_LEADS = 4  # "So I think the answer is: "


class Line(NamedTuple):
    """The first line of an answer without markup: the words that lead to what it says, and that."""

    lead: str
    text: str

    @property
    def follows_verb(self) -> bool:
        """Whether what it says goes on with a sentence ("It is a ...")."""
        return self.lead.rstrip()[-1:].isalpha()


def without_markup(text: str) -> str:
    """An answer without tags, emphasis, code, formulas and reasoning; of one that marks its result, only that."""
    text = html.unescape(_REASONING.sub("", text))
    results = {(boxed or tagged).strip() for boxed, tagged in _RESULT.findall(text)} - {""}
    if len(results) == 1:
        text = results.pop()
    text = _DELIMITER.sub("", _FENCE.sub("", _TAG.sub(" ", text)))
    for pattern in (_COMMAND, _COMMAND, _FORMULA, _EMPHASIS, _EMPHASIS):  # some twice: they may be nested
        text = pattern.sub(r"\g<inner>", text)
    return text.translate(_WIDE).strip()


def first_line(text: str) -> Line:
    """The first line that says something, and the words that lead to it."""
    rest, lead = _MARK.sub("", without_markup(text)).strip(), ""
    for _ in range(MOST_LEADS):
        found = next((match for pattern in _LEADS if (match := pattern.match(rest))), None)
        if found is None or not rest[found.end() :].strip():
            break
        lead, rest = found[0], _MARK.sub("", rest[found.end() :]).strip()
    return Line(lead, _unquoted(_unquoted(_MARK.sub("", rest.partition("\n")[0]).strip())))


def _unquoted(text: str) -> str:
    """A text without quotes or brackets around all of it, and the period behind them."""
    inner = text.removesuffix(".").rstrip()
    for begin, end in _QUOTES:
        if len(inner) > 2 and inner[0] == begin and inner[-1] == end and not {begin, end} & set(inner[1:-1]):
            return inner[1:-1].strip()
    return text


def is_off_format(text: str, answer: str | None) -> bool:
    """Whether an answer was read only because form was taken away.

    That is, if the text is not the answer alone, in any case and with or without a final period, nor, of a letter,
    `B. ` and one line behind it: what prompts ask for, and strict scripts read.
    """
    if answer is None or normalise(text) == normalise(answer):
        return False
    is_labelled = len(answer) == 1 and re.fullmatch(rf"\s*{re.escape(answer)}\.[^\S\n][^\n]+", text)
    return not is_labelled


def normalise(text: str) -> str:
    """Lower case, without surrounding white space and the final period."""
    return text.strip().removesuffix(".").rstrip().lower()


def bare(text: str) -> str:
    """Lower case, without an article before, punctuation around, and white space beyond single blanks."""
    words = " ".join(text.lower().split()).strip(" .,;:!?\"'`*“”‘’")
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", words)


def same_answer(text: str, target: str) -> bool:
    """Whether two short answers are the same `bare` words."""
    return bare(text) == bare(target)
