"""The form of an answer, apart from what it says: markup, words that lead to it, what comes after the first line."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

# "is" and its like, which readers look for, too
BE = r"(?:is|was|are|were|(?:would|should|must|will|could|can|may|might|has\ to)\s+be|(?:seems?|appears?)\s+to\s+be)"

# what may stand before an answer without leading to it
ADVERB = r"""(?:(?:most\ likely|absolutely|certainly|clearly|definitely|likely|obviously|of\ course|oh|probably
    |maybe|perhaps|possibly|presumably|(?:no|without(?:\ a)?)\ doubt)\s*,?\s+)?"""

_REASONING = re.compile(  # the second where a prompt has opened it
    r"<(think|thinking|reasoning)>.*?(?:</\1>|$)|^.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE
)
_RESULT = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_TAG = re.compile(r"<\|[^<>|]*\|>|</?[A-Za-z][^<>]*>|\[/?INST\]")
_FENCE = re.compile(r"```(?:[A-Za-z]+\n)?|`")
_DELIMITER = re.compile(r"\\[()\[\]]|\\(?=[%$])")  # of formulas; of their signs
_COMMAND = re.compile(r"\\(?:text\w*|math\w+|emph|bf|rm)\s*\{(?P<inner>[^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_FORMULA = re.compile(r"\$\$?(?=\S)(?P<inner>[^$\n]+?)(?<=\S)\$\$?(?!\d)")  # not the signs of "$5 and $6"
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|~~)(?=\S)(?P<inner>.+?)(?<=\S)\1(?!\w)")
_MARK = re.compile(  # of a list or head; emphasis cut off; a mark before a word
    r"^\s*(?:[-*•>#=→:;,.]+\s+|[*_~]+(?=\S)|-(?=[A-Za-z]))|(?<=\S)[*_~]+\s*$"
)
_SYMBOL = r"[\u2300-\u23ff\u25a0-\u27bf\u2b00-\u2bff\ufe0f\u200d\U0001f000-\U0001faff]"  # emoji, ornaments
_AROUND = re.compile(rf"^(?:{_SYMBOL}\s*)+|(?:\s*{_SYMBOL})+$")
_NEXT_QUESTION = re.compile(r"^\W*(?:user|human|question|q)\s*:", re.IGNORECASE | re.MULTILINE)
_LONE_TAG = re.compile(r"\s*<([A-Za-z])>\s*")  # "<B>", which is no tag
_ANSWER_KEYS = ("answer", "final_answer", "choice", "option", "result", "response")
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}
_PLAIN = str.maketrans("。、…【】「」\u00a0", ".,.[][] ", "\u200b\ufeff") | _FULL_WIDTH
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_QUOTES = tuple(zip("\"'“‘«([{", "\"'”’»)]}", strict=True))

_LEADS = [
    re.compile(pattern, re.VERBOSE | re.IGNORECASE)
    for pattern in (
        # "Based on the image, "
        r"""(?:based\ on|according\ to|looking\ at|judging\ from|from|in)\s+(?:the|this)\s+(?:\w+\s+)?
            (?:image|picture|photo|photograph|chart|graph|figure|diagram|table|video|document|context|text|information)\b
            [^,:\n]{0,60}[,:]\s*""",
        # "Assistant: ", "Sure! ", "So " before what leads on
        r"(?:assistant|(?-i:USER|ASSISTANT))\s*[:\n]\s*|model\s*\n\s*",
        r"(?:sure|well|ok|okay|hmm|certainly|of\ course)\s*[,!:.]\s*(?=\S)",
        r"(?:so|then)\s*,\s*(?=\S)|(?:thus|hence|therefore)\b\s*[,:]?\s*(?=\S)",
        r"so\s+(?=\(?[a-z]\)?\W*$|(?:yes|no)\b)",
        r"(?:(?:so|then|and)\s+|a\s*:\s*)(?=(?:the|my|it|i|answer|option)\b)",
        r"(?:final|correct|ans)\s*[:.]\s*(?=\S)|(?:所以|因此|我认为|我觉得|应该)\s*,?\s*(?:是|选|为)?(?=\S)",
        r"(?:正确)?(?:答案|选项|选择|选)\s*(?:应该|应)?(?:是|为)?\s*:?\s*(?=\S)",
        # "The answer (to the question) is ", "Answer: ", "Here is my final answer - "
        rf"""(?:here(?:['’]s|\s+is)\s+)?(?:(?:the|my|our|your)\s+)?
            (?:(?:final|correct|right|best|short|single|most|likely|possible|probable|appropriate|suitable|accurate|predicted)\s+)*
            (?:answer|ans|option|choice|response|reply|letter|result|solution|output|prediction|conclusion)\s*
            (?:\s(?:to|for|of|in|here|from)\b[^:.,;=\n]{{0,80}}?)?\s*
            (?:\b{BE}\b(?:\s+that)?|(?=[:=]|-+>|[–—-]\s))\s*[*_]*\s*(?:[:=]+|[-=]+>|→|[–—-](?=\s))?[*_]*\s*""",
        # "It is ", "I think (that) "
        rf"(?:it|this|that)\s*(?:['’]s|\s{BE})\b\s*:?\s*|its\s+(?=\(?[a-z]\)?\W*$|(?:yes|no)\b)",
        r"""(?:i|we)\s*(?:['’](?:d|ll|m)|\s+(?:would|will|am))?\s*
            (?:think|believe|guess|suppose|say|choose|chose|select|pick|go(?:ing)?\ with)\b(?:\s+that\b)?\s*[,:]?\s*
            |(?:choose|select|pick)\s*:?\s*(?=(?:option\s+)?\(?[a-z]\b)""",
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
    if alone := _LONE_TAG.fullmatch(text):
        return alone[1]
    results = {(boxed or tagged).strip() for boxed, tagged in _RESULT.findall(text)} - {""}
    if len(results) == 1:
        text = results.pop()
    text = _of_json(_DELIMITER.sub("", _FENCE.sub("", _TAG.sub(" ", text))))
    text = _FRACTION.sub(r"\1/\2", text)
    for pattern in (_COMMAND, _COMMAND, _FORMULA, _EMPHASIS, _EMPHASIS):  # some twice: they may be nested
        text = pattern.sub(r"\g<inner>", text)
    return _AROUND.sub("", text.translate(_PLAIN).strip())


def _of_json(text: str) -> str:
    """What a text that is one JSON object gives as its answer; any other text as it is."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    answers = [str(found[key]) for key in _ANSWER_KEYS if isinstance(found.get(key), str | int | float)]
    return answers[0] if len(answers) == 1 else text


def first_line(text: str) -> Line:
    """The first line that says something, and the words that lead to it."""
    rest, lead = _MARK.sub("", without_markup(text)).strip(), ""
    for _ in range(MOST_LEADS):
        found = next((match for pattern in _LEADS if (match := pattern.match(rest))), None)
        if found is None or not rest[found.end() :].strip():
            break
        lead, rest = found[0], _MARK.sub("", rest[found.end() :]).strip()
    return Line(lead, _unquoted(_unquoted(_MARK.sub("", rest.partition("\n")[0]).strip())))


def before_next_question(text: str) -> str:
    """What a text says before it goes on with a question of its own ("USER: ", "Question: ")."""
    asked = _NEXT_QUESTION.search(text)
    return text[: asked.start()] if asked else text


def written_lines(text: str) -> list[str]:
    """The lines that are not blank of what a text says before it goes on with a question of its own."""
    return [line for line in before_next_question(text).splitlines() if line.strip()]


def _unquoted(text: str) -> str:
    """A text without quotes or brackets around all of it, and the period behind them."""
    inner = text.removesuffix(".").rstrip()
    for begin, end in _QUOTES:
        if len(inner) > 2 and inner[0] == begin and inner[-1] == end and not {begin, end} & set(inner[1:-1]):
            return inner[1:-1].strip()
    return text


def is_off_format(text: str, answer: str | None, labels: Sequence[str] = ("{}.",)) -> bool:
    """Whether an answer was read only because form was taken away.

    That is, if the text is not the answer alone, in any case and with or without a final period, nor, of a letter, one
    of its `labels` as the question has it, alone or with one line behind it: what prompts ask for, and strict scripts
    read.
    """
    if answer is None or normalise(text) == normalise(answer):
        return False
    if len(answer) > 1:
        return True
    written = "|".join(re.escape(label.format(answer)) for label in labels)
    return not re.fullmatch(rf"\s*(?:{written})(?:[^\S\n][^\n]+|\s*)", text)


def normalise(text: str) -> str:
    """Lower case, without surrounding white space and the final period."""
    return text.strip().removesuffix(".").rstrip().lower()


def bare(text: str) -> str:
    """Lower case, without an article before, punctuation around, and white space beyond single blanks."""
    words = " ".join(text.lower().translate(_STRAIGHT).split()).rstrip(" .,;:!?\"'`*“”‘’")
    words = re.sub(r"^(?:[ ,;:!?\"'`*“”‘’]|\.(?!\d))+", "", words)  # ".5" keeps its period
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", words)


def same_answer(text: str, target: str) -> bool:
    """Whether two short answers are the same `bare` words."""
    return bare(text) == bare(target)
