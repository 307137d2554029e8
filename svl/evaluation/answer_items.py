"""From an answer to the items of its task's metrics: read, compared with what is right, and whether it kept the form.

An item is a dict: `score` is right (1) or wrong (0) or a share of right, `answer` what was read (None: nothing could
be, which is wrong), and some metrics need more of it (svl.evaluation.task_metrics).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from svl.core import SvlError
from svl.evaluation.reading import (
    LETTERS,
    LETTERS_OF_MULTIPLES,
    is_off_format,
    normalise,
    read_choice,
    read_number,
    read_short_answer,
    read_word,
    read_yes_no,
    same_answer,
)

Item = dict[str, Any]
YES_NO_METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")

YES_NO = ("yes", "no")

_APART = re.compile(r"(yes|no)\s*(?:[,.]|$)", re.IGNORECASE)
_LISTED = re.compile(r"^\s*\(?([A-Z])[.:)]\s+(.+?)\s*$", re.MULTILINE)


def scored(answer: str | None, right: str, /, **more: Any) -> Item:
    """The item of an answer that was read (None: could not be), by what is right."""
    return {"score": float(answer == right), "answer": answer, **more}


def off_format(text: str, answer: str | None, labels: Sequence[str] = ("{}.",)) -> dict[str, Item]:
    """The item of an answer's form: 1 if it was read only because form was taken away (see `is_off_format`)."""
    return {"off_format": {"score": float(is_off_format(text, answer, labels)), "answer": answer}}


def yes_no_items(text: str, target: str, **more: Any) -> dict[str, Item]:
    """The items of an answer to a yes-or-no question: one for each of YES_NO_METRICS, for its form, above chance."""
    wanted, answer = normalise(target), read_yes_no(text)
    found = scored(answer, wanted, target=wanted, **more)
    return {
        **dict.fromkeys(YES_NO_METRICS, found),
        "above_chance": {**found, "chance": 1 / 2},
        **off_format(text, answer),
    }


def choice_items(
    text: str,
    options: Mapping[str, Any],
    target: str,
    metric: str = "accuracy",
    labels: Sequence[str] = ("{}.",),
    **more: Any,
) -> dict[str, Item]:
    """The items of an answer that chooses one of lettered `options`: for `metric`, for its form, above chance.

    Raises:
        SvlError: if there are no options.
    """
    if not options:
        raise SvlError("a multiple-choice question has no options")
    answer = read_choice(text, options)
    found = scored(answer, target, **more)
    chance = {**found, "chance": 1 / len(options)}
    return {metric: found, "above_chance": chance, **off_format(text, answer, labels)}


def short_items(text: str, target: str, metric: str = "accuracy") -> dict[str, Item]:
    """The items of an answer in one's own words, compared as a whole: for `metric`, and for its form."""
    answer = read_as(text, target)
    is_right = answer is not None and same_answer(answer, target)
    return {metric: {"score": float(is_right), "answer": answer}, **off_format(text, target if is_right else answer)}


def read_as(text: str, target: str, counted: bool = True) -> str | None:
    """A short answer, read as what the right one is: yes or no, a plain number, or a text.

    Numbers are given in the words of the right one; `counted`: what is counted may be named behind ("2 cars").
    """
    answer = read_short_answer(text)
    if answer is None or same_answer(answer, target):
        return answer
    if normalise(target) in YES_NO:
        return read_yes_no(text) or answer
    said, right = read_number(text, [target]), read_number(target, [target])
    if said is None or right is None or said.value != right.value or right.unit[:1].isalpha():
        return answer
    is_same = agree(said.unit, right.unit) if counted else said.unit == right.unit
    return target if is_same else answer


def read_as_people(text: str, right: Sequence[str]) -> set[str]:
    """What `read_as` makes of a short answer by each of several people's.

    Where most of these are no yes or no, only one that stands apart is read: "no, it is" is a no, "no dogs" is none.
    """
    is_closed = 2 * sum(normalise(answer) in YES_NO for answer in right) > len(right)
    found = set()
    for answer in right:
        if normalise(answer) in YES_NO and not is_closed:
            said = read_short_answer(text) or ""
            apart = _APART.match(said)
            found.add(apart[1].lower() if apart else said)
        else:
            found.add(read_as(text, answer, counted=False) or "")
    return found


def agree(unit: str, other: str) -> bool:
    """Whether two units are the same, or one is left out; not one that may be a multiple: "12" is no "12 m"."""
    return unit == other or (not (unit and other) and (unit or other) not in LETTERS_OF_MULTIPLES)


def word_items(text: str, target: str) -> dict[str, Item]:
    """The items of an answer that should be one word: for accuracy, and for its form."""
    answer = read_word(text)
    found = {"score": float(answer is not None and same_answer(answer, target)), "answer": answer}
    return {"accuracy": found, **off_format(text, answer)}


def lettered(choices: Sequence[Any]) -> dict[str, Any]:
    """{"A": first choice, ...}.

    Raises:
        SvlError: if there are more choices than letters.
    """
    if len(choices) > len(LETTERS):
        raise SvlError(f"a question has {len(choices)} choices, more than there are letters ({len(LETTERS)})")
    return dict(zip(LETTERS, choices, strict=False))


def listed_options(question: str) -> dict[str, str]:
    """The options that a question's text lists, a line each ("A. red")."""
    return dict(_LISTED.findall(question))
