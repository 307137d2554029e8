"""Reading answers: options with markup and initials, corrections, units, conclusions after reasoning."""

from __future__ import annotations

import pytest

from svl.evaluation import reading
from svl.evaluation.answer_items import read_as_people
from svl.evaluation.tasks import utils

choose = reading.read_choice
ANIMALS = {"A": "cat", "B": "dog", "C": "bird", "D": "horse"}
LETTERS = dict.fromkeys("ABCD")
SPECIES = {"A": "C. elegans", "B": "D. melanogaster", "C": "E. coli", "D": "A. thaliana"}
MARKED = {"A": "$x^2$", "B": "**bold**", "C": "$\\frac{3}{4}$", "D": "don't", "E": "<b>x</b>", "F": "<red>"}


@pytest.mark.parametrize("form", ["{}", "{}.", "The answer is {}", "The answer is {}.", "\\boxed{{{}}}", "**{}**"])
@pytest.mark.parametrize(
    ("texts", "letter"),
    [
        (("$x^2$", "x^2"), "A"),
        (("bold",), "B"),
        (("\\frac{3}{4}", "$\\frac{3}{4}$", "3/4"), "C"),
        (("don't", "don’t"), "D"),
    ],
)
def test_options_are_stripped_as_answers_are(form, texts, letter):
    assert {choose(form.format(text), MARKED) for text in texts} == {letter}


def test_what_markup_leaves_nothing_of_stays():
    assert choose("<red>", MARKED) == "F"
    assert choose("It is <b>x</b>", MARKED) == "E"
    same = {"A": "$x$", "B": "x"}
    assert [choose(text, same) for text in ("$x$", "x", "The answer is x.")] == ["A", "B", "B"]  # to the letter first


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((text, "A") for text in ("C. elegans", "The answer is C. elegans.", "It is C. elegans", "**C. elegans**",
            "Answer: C. elegans", "The organism is C. elegans.", "The answer is C. elegans because")),
        *((text, "D") for text in ("A. thaliana", "Answer: A. thaliana", "D. A. thaliana", "(D) A. thaliana", "D")),
        *((text, "B") for text in ("B. D. melanogaster", "B", "The answer is B", "B. D. melanogaster\nC. E. coli")),
        *((text, "C") for text in ("C", "C. E. coli", "E. coli", "The answer is C.")),
        ("A. C. elegans\nB. D. melanogaster\nC. E. coli", None),
        ("E", None),
    ],
)  # fmt: skip
def test_options_that_begin_with_a_letter(text, letter):
    assert choose(text, SPECIES) == letter


def test_a_formula_that_begins_with_a_letter_is_no_letter():
    options = {"A": "E = mc", "B": "B = ma", "C": "F = ma", "D": "none", "E": "all"}
    assert [choose(f"The answer is {text}", options) for text in ("E = mc", "B = ma", "E")] == ["A", "B", "E"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((text, "B") for text in ("B. dog\nC. bird", "(B) dog\n(C) bird\n(D) horse", "B. dog\n\nA. cat is incorrect",
            "B. dog\nA. The cat is not shown.", "B) dog\n\nC) bird")),
        ("D. horse\n\nA. cat\nB. dog", "D"),
        ("A. cat\n\nB. dog is incorrect because it barks", "A"),
        ("A. cat\nB. dog\nC. bird\nD. horse", None),
        ("A. cat\n\nB. dog", None),
    ],
)  # fmt: skip
def test_only_what_begins_with_the_first_option_is_a_list(text, letter):
    assert choose(text, ANIMALS) == letter


@pytest.mark.parametrize(("first", "second"), [("B", "C"), ("C", "B")])
@pytest.mark.parametrize(
    "form",
    [
        *("The answer is {0}. No, the answer is {1}.", "Answer: {0}. Wait, that's wrong. The answer is {1}.",
            "{0}. Actually, the answer is {1}.", "{0}, no, {1}", "{0}. No, it is {1}.", "{0}. Sorry, I mean {1}."),
        *("The answer is {0}.\nWait, no. The answer is {1}.", "The dog barks, so the answer is {0}. No, it is {1}."),
    ],
)  # fmt: skip
def test_what_is_taken_back_is_not_read(form, first, second):
    """Two letters are left open, whichever comes first; as in "A or B"."""
    for options in (ANIMALS, LETTERS):
        assert choose(form.format(first, second), options) is None


@pytest.mark.parametrize(
    "text",
    [
        *("B. No, it is not a cat", "B. There is no dog in option A.", "B. No. 5 on the list", "B, no doubt"),
        *("The answer is B. No other option fits.", "B. Actually, B is what I see", "B. Wait for the bus"),
        *("B\nQuestion: what?\nActually, the answer is C", "B\nUSER: no, the answer is C."),
    ],
)
def test_what_only_looks_like_a_correction_is_read(text):
    assert choose(text, LETTERS) == "B"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((text, "B") for text in ("The picture shows something.\nB", "Let me see.\n\n**B**", "I look.\n\n(B)",
            "Step 1: look.\nStep 2: think.\nB.", "The animal barks.\n\nTherefore, B.", "The animal is a dog.\nB")),
        *((text, None) for text in ("The animal is a cat.\nB", "Let me see.\nBig", "I see it.\nQuestion: what?\nB")),
        *((text, "B") for text in ("Ans B", "B → dog", "B选项", "所以答案是B", "我认为是B", "应该选B", "its b",
            "assistant\nB", "model\nB", "USER: B", "the answer is b.")),
        *((text, "A") for text in ("the answer is a.", "Answer is a.")),
        *((text, None) for text in ("It is a.", "The answer is a", "its bark", "model B")),
    ],
)  # fmt: skip
def test_forms_of_a_letter(text, letter):
    assert choose(text, ANIMALS) == letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *((text, "yes") for text in ("是的，图中有", "对，是的", "USER: yes", "I look.\n2. I see it.\n\nYes")),
        *((text, "no") for text in ("没有，图中没有", "不是，图中没有", "model\nNo", "assistant\nNo", "its no")),
        *((text, None) for text in ("是不是", "没有人", "I look.\nQuestion: is it?\nNo", "I look.\nNobody")),
    ],
)
def test_forms_of_yes_and_no(text, answer):
    assert reading.read_yes_no(text) == answer


MULTIPLES = ["12万", "1.2亿", "12 mln", "12 mrd", "12 Mrd", "12 tn", "12 bil", "12 bil.", "12 T", "12 bln", "12 m"]


@pytest.mark.parametrize("text", MULTIPLES)
def test_a_multiplied_number_is_not_the_plain_one(text):
    assert reading.read_number(text) is None
    assert not utils.is_relaxed_match(text, "12")
    assert choose(text, {"A": "12", "B": "1.2"}) is None


def test_a_letter_is_a_unit_where_what_is_right_has_it():
    metres = {"A": "12 cm", "B": "15 cm", "C": "15 m", "D": "20 m"}
    said = ("15m", "The length is 15 m.", "15cm", "20", "20.0 m", "15 million")
    assert [choose(text, metres) for text in said] == ["C", "C", "B", "D", "D", None]
    assert choose("15", metres) is None
    assert reading.read_number("12 m", ["30 meters"]) == reading.Number(12, "m")
    assert reading.read_number("12 M", ["30 m"]) is reading.read_number("12 m", ["3 million"]) is None
    assert utils.is_relaxed_match("The length is 12.1 m.", "12 m")
    assert not utils.is_relaxed_match("12", "12 m")  # which may be millions


def test_one_no_among_many_answers_makes_no_no_of_a_text():
    pytest.importorskip("lmms_eval")

    def score(text: str, *answers: str) -> float:
        return utils.vqa({"answers": list(answers), "question_id": 1}, [text])["exact_match"]["score"]

    signs = (*["no smoking"] * 7, *["no"] * 3)
    assert score("no dogs allowed", *signs) == 0
    assert score("no", *signs) == score("No, it is", *signs) == score("No.", *signs) == pytest.approx(0.9)
    assert score("no dogs", *["no"] * 6, *["dark"] * 4) == 1
    assert read_as_people("no dogs allowed", signs) == {"no dogs allowed"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *((text, "12") for text in ("To find it, add both.\n\nThe answer is 12.", "5 + 7 = 12\nAnswer: 12",
            "We add 5 and 7.\nSo, the final answer is: **12**", "We add 5 and 7.\nAnswer:\n12")),
        *((text, "12") for text in ("12\nAnswer: 13", "12\nQuestion: how many?\nAnswer: 13", "12.\nThe answer is 13")),
        ("It is on the left side\nQuestion: where?\nAnswer: right", "on the left side"),
        ("We add 5 and 7.\nAnswer: 12\nAnswer: 13", "We add 5 and 7"),  # two
    ],
)  # fmt: skip
def test_a_short_answer_after_reasoning(text, answer):
    assert reading.read_short_answer(text) == answer


def test_words_with_commas_inside():
    said = {"10,000": "10,000", "10,000 people": "10,000", "red, blue": None, "10, 000": None, "1,2": None}
    assert [reading.read_word(text) for text in said] == list(said.values())
