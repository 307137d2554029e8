"""Answers to questions with lettered options."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from svl.evaluation.reading.denial import is_denied, is_denied_behind
from svl.evaluation.reading.form import (
    ADVERB,
    BE,
    Line,
    bare,
    before_next_question,
    first_line,
    normalise,
    same_answer,
    without_markup,
    written_lines,
)
from svl.evaluation.reading.open import read_number

LETTERS = string.ascii_uppercase
WORDS = "AI"  # letters that are words by themselves

_LETTER = re.compile(
    rf"""(?:\d+[.)]\s+)?{ADVERB}(?:(?:the\s+)?(?:option|choice|answer|ans|letter)\b\s*:?\s*)?["'(\[{{*]*\s*
        (?P<letter>[A-Z])(?:\s*选项|(?![\w'’+#]))\s*(?P<close>["')\]}}*]*)(?P<rest>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
_NAMES_ANSWER = re.compile(r"\b(?:answer|option|choice|letter)\b", re.IGNORECASE)
_REPEATED = re.compile(r"\W*([A-Z])(?:\W*\1)+\W*")  # "B B B"
_IS_RIGHT = r"is\s+(?:the\s+|my\s+)?(?:most\s+)?(?:correct|right|best|true|answer|accurate|likely|appropriate)\b"
# what may stand behind a letter that is no word: an end, a mark (not that of "A.M."), or what says so
_APART = re.compile(
    rf"""\s*$|[)\]}},;!?]|[/|](?!\w)|[.:](?![A-Za-z](?:\W|$))|\s*[:;,.](?:\s|$)|\s*(?:[–—=→]|-+>|-\s)|\s*[(\[]
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
_LIKE_A_LABEL = re.compile(r"[A-Z][.):]\s*\S")
_TAKES_BACK = re.compile(  # "B. No, the answer is C"; not "no dog", "No. 5"
    r"(?:^|(?<=\W))(?:no\s*(?:[,!:;–—-]|\.(?!\s*\d))|(?:wait|actually|sorry|correction|oops|scratch\s+that|i\s+mean)\b)",
    re.IGNORECASE | re.MULTILINE,
)
_LETTER_ALONE = re.compile(r"[\s,.:;!–—-]*(?:(?:it['’]s|it\s+is)\s+)?\(?([A-Z])\)?(?=\s*(?:[.,;!]|$))")
_LAST_LINE = re.compile(r"(?:(?i:option|choice|answer)\s*:?\s*)?\(?([A-Z])\)?\.?")
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
    stripped = {letter: _without_markup(option) for letter, option in options.items()}
    whole = _option_of_text(line.text, options) or _option_of_text(line.text, stripped)
    as_letter, all_as_letters = (_with_letters_for(words, stripped) for words in (line.text, plain))
    letter = _letter_of_line(line._replace(text=as_letter), stripped)
    if letter and whole and len(bare(line.text)) > 1:  # an option that begins with a letter: "E = mc"
        letter = whole
    if letter is None or _lists_options(all_as_letters, letter, stripped):
        said = _letters_said(all_as_letters, options)
        if letter and len(said) != 1:  # of a list that comes to no end
            return None
        letter = said.pop() if len(said) == 1 else None
    if letter:
        return None if _is_taken_back(all_as_letters, letter, options) else letter
    named = (
        whole
        or _option_with_label(line.text, stripped)
        or _option_of_sentence(line.text, stripped)
        or _option_of_number(line.text, stripped)
    )
    concluded = _letter_of_last_line(plain, options)
    return named or concluded if None in (named, concluded) or named == concluded else None


def _without_markup(option: Any) -> str | None:
    """An option's text as an answer's is read; as it is where nothing would be left."""
    return None if option is None else without_markup(str(option)) or str(option)


def _with_letters_for(text: str, options: Mapping[str, str | None]) -> str:
    """A text with the letters of options instead of those that look like another one's label: "C. elegans"."""
    alike = [(option, letter) for letter, option in options.items() if option and _LIKE_A_LABEL.match(option)]
    for option, letter in sorted(alike, key=lambda pair: -len(pair[0])):
        text = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", letter, text, flags=re.IGNORECASE)
    return text


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
    is_ended = rest.strip() == "." and _NAMES_ANSWER.search(line.lead)  # "The answer is a."
    if match["letter"] in "ai" and line.follows_verb and not (match["close"] or is_ended):
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
    """Whether a text labels the first option in its first line and the second one in the next: a list, not a choice.

    Not where the second is denied: "A. cat\\nB. dog is wrong".
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    labels = [_LABELLED_LINE.match(line) for line in lines[:2]]
    if [match and match[1] for match in labels] == list(options)[:2] and labels[0] and labels[1]:
        second = lines[1][labels[1].end() - 1 :]
        own = str(options[labels[1][1]] or "")
        return letter == labels[0][1] and not is_denied_behind(_without_start(second, own))
    return [line.strip("().:") for line in lines[: len(options)]] == list(options)


def _is_taken_back(text: str, letter: str, options: Mapping[str, Any]) -> bool:
    """Whether a text that names a letter goes on with "no", "wait" or their like and another one."""
    text = before_next_question(text)
    for marker in _TAKES_BACK.finditer(text):
        rest = text[marker.end() :]
        said, alone = _letters_said(rest, options), _LETTER_ALONE.match(rest)
        if alone and alone[1] in options:
            said.add(alone[1])
        if said - {letter}:
            return True
    return False


def _letter_of_last_line(text: str, options: Mapping[str, Any]) -> str | None:
    """The letter that stands alone in the last of several lines."""
    lines = written_lines(text)
    found = _LAST_LINE.fullmatch(first_line(lines[-1]).text) if len(lines) > 1 else None
    return found[1] if found and found[1] in options else None


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
    texts = [str(option) for option in options.values() if option is not None]
    said, numbers = read_number(text, texts), dict(zip(options, (read_number(t, texts) for t in texts), strict=False))
    if said is None or len(texts) < len(options):
        return None
    known = {letter: number for letter, number in numbers.items() if number is not None}
    same = [letter for letter, number in known.items() if number.value == said.value]
    if len(same) > 1:  # "12 cm" and "12 m"
        same = [letter for letter in same if known[letter].unit == said.unit]
    return same[0] if len(known) == len(options) and len(same) == 1 else None
