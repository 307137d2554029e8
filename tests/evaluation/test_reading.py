"""Reading answers: what counts as yes, no, a letter, an option."""

from __future__ import annotations

import pytest

from svl.evaluation import reading


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *[(text, "yes") for text in ("yes", "Yes.", " yes, there is")],
        *[(text, "no") for text in ("NO!", "no", "No, a red one", '"no"')],
        *[(text, None) for text in ("", "yesterday", "not sure", "there is", "red", "</s>")],
    ],
)
def test_yes_and_no(text, answer):
    assert reading.read_yes_no(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(text, "B") for text in ("B", "b", " B ", "B.", "(B)", "B. red", "B . red", "(B) red")],
        *[(text, None) for text in ("A red circle", "Both", "", "red", "?", "12")],
    ],
)
def test_letters(text, letter):
    assert reading.read_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(t, "B") for t in ("B", "b.", "(B)", "B. green", "The answer is B.", "Answer: (B)", "green", "Green.")],
        *[(t, None) for t in ("Big", "", "E", "A or B? The answer is A, no, the answer is B", "A red car", "gre")],
    ],
)
def test_choices(text, letter):
    options = {"A": "red", "B": "green", "C": "blue", "D": "red", "F": None}
    assert reading.read_choice(text, options) == letter


def test_a_text_of_two_options_chooses_neither():
    assert reading.read_choice("red", {"A": "red", "B": "green", "C": "red"}) is None


def test_normalised_text():
    assert [reading.normalise(text) for text in (" Red. ", "red", "3.5", "a..")] == ["red", "red", "3.5", "a."]
