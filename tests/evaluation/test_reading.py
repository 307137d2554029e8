"""Reading answers: what counts as yes, no, a letter, an option, a number, a short answer, and what must not."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svl.evaluation import reading

OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "red"}

# An answer in every form that models give it; {} is the answer itself.
FORMS = [
    *("{}", " {} ", "{}.", "{}\n", "{}\nWhat is next?", "{}\n\nThe picture shows a house.", "\n\n{}", "{}!"),
    *("**{}**", "**{}", "{}**", "*{}*", "__{}__", "_{}_", "***{}***", "**{}**.", "`{}`", "```\n{}\n```",
        "```text\n{}\n```"),
    *("<b>{}</b>", "<i>{}</i>.", "<p>{}</p>", "{}<br>", "{}</s>", "{}<|im_end|>", "<answer>{}</answer>", "&nbsp;{}"),
    *("$\\boxed{{{}}}$", "\\boxed{{\\text{{{}}}}}", "$\\text{{{}}}$", "\\({}\\)", "${}$",
        "So we get \\boxed{{{}}}. Done"),
    *("# {}", "### {}", "> {}", "- {}", "* {}", "• {}", '"{}"', "'{}'", "“{}”", "({})", "[{}]", "['{}']"),
    *("Answer: {}", "answer: {}", "ANSWER: {}", "Answer:{}", "Answer - {}", "Answer = {}", "Answer:\n{}",
        "### Answer\n{}"),
    *("The answer is {}", "The answer is {}.", "The answer is: {}", "The answer is: **{}**.", "**Answer:** {}"),
    *("**Answer: {}**", "The correct answer is {}.", "The best answer would be {}", "My final answer is: {}"),
    *("Final answer: {}", "The final answer is $\\boxed{{{}}}$", "Here is my answer: {}", "Response: {}", "Result: {}"),
    *("The answer to the question is {}.", "So the answer is {}.", "Therefore, the correct answer is: {}", "答案：{}"),
    *("Sure! {}", "Sure, the answer is {}.", "Based on the image, {}", "Based on the image, the answer is {}."),
    *("I think the answer is {}.", "I would say {}", "I believe it is {}.", "<think>Is it X? No.</think>\n{}"),
]  # fmt: skip


def written(form: str, answer: str) -> str:
    return form.replace("### Answer\n{}", "### Answer: {}").format(answer)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_read_in_every_form(form):
    assert reading.read_yes_no(written(form, "Yes")) == "yes"
    assert reading.read_yes_no(written(form, "no")) == "no"
    assert reading.read_choice(written(form, "B"), OPTIONS) == "B"
    assert reading.read_choice(written(form, "B"), dict.fromkeys("ABCD")) == "B"
    assert reading.read_choice(written(form, "green"), OPTIONS) == "B"
    assert reading.same_answer(reading.read_short_answer(written(form, "red")) or "", "Red")
    assert reading.read_word(written(form, "red circle")) == "red"
    assert reading.read_number(written(form, "12.5")) == reading.Number(12.5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *[
            (t, "yes")
            for t in ("yes", "Yes.", " yes, there is", "Yes there is", "YES!", "Yeah", "y", "A: yes", "1. Yes")
        ],
        *[
            (t, "yes")
            for t in ("It's a yes.", "It is yes", "Definitely yes", "Yes, no doubt", "Yes, there are no others")
        ],
        *[
            (t, "yes")
            for t in (
                "Yes\nNo\nYes",
                "There is a dog, so the answer is yes.",
                "Yes - there is",
                "yes no no",
                "Yes. No.",
                "yes square",
            )
        ],
        *[
            (t, "no")
            for t in ("NO!", "no", "No, a red one", '"no"', "Nope", "n", "No\nYes", "No - there is not", "No. It is")
        ],
        *[(t, None) for t in ("", "yesterday", "not sure", "there is", "red", "</s>", "I cannot say", "snow", "know")],
        *[
            (t, None)
            for t in ("No one", "No. 5", "No idea", "none", "nothing", "Nobody", "It is no wonder that", "noon")
        ],
        *[(t, None) for t in ("Yes or no", "yes/no", "No, yes there is", "Please answer yes or no")],
    ],
)
def test_yes_and_no(text, answer):
    assert reading.read_yes_no(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[
            (t, "B")
            for t in ("B", "b", " B ", "B.", "(B)", "b)", "B :", "B: green", "B. green", "B . green", "(B) green")
        ],
        *[
            (t, "B")
            for t in ("B) green", "B - green", "B, green", "B green", "B.green", "**B. green**", "**B.** green")
        ],
        *[(t, "B") for t in ("Option B", "option (b)", "It is B", "It's B.", "I choose B", "The right option is B.")],
        *[
            (t, "B")
            for t in ("B is correct", "B is the right answer", "B because the leaf is", "The answer is (B) green.")
        ],
        *[
            (t, "B")
            for t in (
                "The leaf is wet, so the correct option is B.",
                "The leaf is green.",
                "green",
                "Green.",
                "the green",
                "It is green",
            )
        ],
        *[
            (t, "B")
            for t in ("Green, as the leaf", "B\nC", "B\nWhat is it?\nA. red\nB. green", "Let me see.\nThe answer is B.")
        ],
        *[(t, "B") for t in ("B at 2", "B nothing", "B small purple square", "B 5", "B C", "B is red")],
        *[
            (t, None)
            for t in (
                "Big",
                "",
                "E",
                "?",
                "12",
                "gre",
                "A red car",
                "A cat is sitting",
                "Both",
                "a dog",
                "I",
                "not sure",
            )
        ],
        *[
            (t, None)
            for t in ("I think so", "A man", "An apple", "Dog", "D-day", "C++", "A.M.", "B's", "A-frame", "B12")
        ],
        *[
            (t, None)
            for t in ("A or B", "A and B", "A, B", "A/B", "A B C D", "A. red B. green C. blue", "A. red\nB. green")
        ],
        *[
            (t, None)
            for t in ("A or B? The answer is A, no, the answer is B", "The options are A, B, C and D", "red, green")
        ],
        *[
            (t, None)
            for t in ("It is a", "It is a cat", "The answer is a cat", "The answer is A cat on a mat", "Option A shows")
        ],
        *[
            (t, None)
            for t in (
                "Option B is wrong",
                "B is wrong",
                "The answer is not B",
                "B does not fit",
                "B C D",
                "b at 2",
                "A 5",
                "None of the above",
                "red or green",
            )
        ],
    ],
)
def test_choices(text, letter):
    assert reading.read_choice(text, OPTIONS | {"F": None}) == letter


ANIMALS = {"A": "cat", "B": "dog", "C": "red car", "D": "a house"}
MENU = "A. cat\nB. dog\nC. red car\nD. a house"


@pytest.mark.parametrize(
    "text",
    [
        *("The answer is not option B.", "It is not option B.", "Not option B", "It can't be option B.",
            "I don't think option B is correct", "I don't think the answer is B.", "I'm not sure the answer is B.",
            "I don't think it is a dog", "I doubt that it is a dog", "If it is a dog", "Which option is B?"),
        *("B cannot be right", "B is impossible", "B is unlikely", "B, which is wrong", "B - wrong", "B, not correct",
            "Dog, no", "(B) dog is wrong", "The dog is unlikely"),
        *("Answer: A, B", "Answer: A,B", "The answer is A, C and D.", "Neither A nor B"),
        *(MENU, "Option A: cat\nOption B: dog", "A - cat\nB - dog", "- A. cat\n- B. dog", "A\nB\nC\nD"),
    ],
)  # fmt: skip
def test_what_is_denied_doubted_or_listed_is_no_choice(text):
    assert reading.read_choice(text, ANIMALS) is None


@pytest.mark.parametrize(
    "text",
    [
        *("So B", "So, B", "Therefore, B.", "Thus B", "Hence, B", "Maybe B", "Perhaps B", "No doubt B", "Choose B",
            "Select option B", "The option B", "The letter B", "correct: B", "Final: B", "Ans. B"),
        *("B, not A", "B and not A", "B, because A is not round", "The answer is B, not A.", "B. Not A",
            "The correct answer is B and not A", "B is correct, A is wrong", "It is no cat, so the answer is B.",
            "There is no doubt that the answer is B", "I'm not sure, but the answer is B",
            "The answer is B, it is not A", "Since there is no sign the answer is B",
            "If I had to choose, the answer is B", "(B) it is not round"),
        *("B (dog)", "B [dog]", "B (see picture)", "B?", "B👍", "✅ B", "B…", "B、", "「B」", ": B", ". B", "<B>"),
        *("B B B", "BBBB", "B.B.", '{"answer": "B"}', '```json\n{"answer": "B"}\n```'),
        *("答案是B", "正确答案是B。", "选B"),
        *(f"{MENU}\nAnswer: B", f"{MENU}\n\nThe answer is B.", "Is it A?</think>\n\nB",
            "A because it is red. No.\n</think>\n\nB"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [ANIMALS, dict.fromkeys("ABCD")], ids=["known", "unknown"])
def test_a_letter_is_read_whatever_stands_around_it(text, options):
    assert reading.read_choice(text, options) == "B"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *[(t, "no") for t in ("(Yes/No) No", "(Yes or No) No", "Yes or No: No", "Hence no", "nono", "Therefore, no.",
            "否", "不是。", "Please answer yes or no. No")],
        *[(t, "yes") for t in ("So, yes.", "Therefore, yes", "YesYes", "No doubt, yes", "hmm</think>Yes", "是的",
            "I think so, yes", "There is no cat, so the answer is yes.", '{"answer": "yes"}')],
        *[(t, None) for t in ("I don't think the answer is yes", "I'm not sure if the answer is yes.",
            "If so, the answer would be yes", "Yes or no question", "Yes or no (choose one)", "A. Yes B. No",
            "(A) Yes (B) No", "Yes: 1, No: 0", "No doubt", "No wonder", "There is no dog", "There is a dog")],
    ],
)  # fmt: skip
def test_menus_doubts_and_conclusions_of_yes_and_no(text, answer):
    assert reading.read_yes_no(text) == answer


@pytest.mark.parametrize(
    "text", ["B. No, it is not.", "No, it isn't.", "(B) No, it does not", "No", "no.", "The answer is No."]
)
def test_a_no_among_the_options_denies_nothing(text):
    assert reading.read_choice(text, {"A": "Yes", "B": "No"}) == "B"


def test_a_negation_elsewhere_denies_nothing():
    assert reading.read_choice("The car with no lights is red", {"A": "red", "B": "blue"}) == "A"
    assert reading.read_choice("B. red, it is not blue", {"A": "blue", "B": "red"}) == "B"
    assert reading.read_choice("There is no dog", ANIMALS) is None


def test_options_that_differ_in_little():
    """To the letter first, then but for case, then but for an article; the longer of two; numbers by their value."""
    choose = reading.read_choice
    assert [choose(t, {"A": "FF", "B": "Ff", "C": "ff"}) for t in ("FF", "Ff", "ff", "fF")] == ["A", "B", "C", None]
    assert [choose(t, {"A": "few", "B": "a few"}) for t in ("a few", "few", "The few")] == ["B", "A", None]
    assert choose("It is a cat and dog", {"A": "cat", "B": "cat and dog"}) == "B"
    assert [choose(t, {"A": "1", "B": "10"}) for t in ("ten", "10 dogs", "one", "two")] == ["B", "B", "A", None]
    assert choose(".5", {"A": "5", "B": ".5"}) == "B"
    assert choose(".5", {"A": "5", "B": "50"}) is None
    assert choose("C major chord", {"A": "C major", "B": "G major", "C": "D major"}) is None  # no C that runs on
    assert choose("The animal is B. dog", ANIMALS) == choose("Dog is the answer", ANIMALS) == "B"
    many = {letter: f"thing {letter}" for letter in string.ascii_uppercase[:14]}
    assert choose("L", many) == choose("The reason is this. The answer is L.", many) == "L"


def test_a_text_of_two_options_chooses_neither():
    assert reading.read_choice("red", OPTIONS) is None
    assert reading.read_choice("blue", OPTIONS) == "C"


def test_options_that_look_like_letters_and_sentences():
    assert reading.read_choice("C", {"A": "C", "B": "B", "C": "A"}) == "C"
    assert reading.read_choice("B. Vitamin C", {"A": "Vitamin B", "B": "Vitamin C", "C": "no"}) == "B"
    assert reading.read_choice("It is a cat.", {"A": "It is a dog", "B": "It is a cat"}) == "B"
    assert reading.read_choice("A cat", {"A": "a dog", "B": "a cat"}) == "B"  # an article, no letter
    assert reading.read_choice("Yes, it is", {"A": "yes", "B": "no"}) == "A"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[(t, reading.Number(12)) for t in ("12", "12.", "12.0", "twelve", "Twelve.", "about 12", "~12",
            "There are 12", "1.2e1")],
        *[(t, reading.Number(12)) for t in ("There are twelve", "The value is 12.", "The total in the chart is 12",
            "12\n13")],
        *[(t, reading.Number(12, "%")) for t in ("12%", "12 %", "about 12 percent", "It is 12 percent.", "12\\%")],
        *[(t, reading.Number(1200, "$")) for t in ("$1,200", "$1200.00", "The price is $1,200.")],
        *[("12 people", reading.Number(12, "people")), ("12 km/h", reading.Number(12, "km/h"))],
        *[("-5", reading.Number(-5)), ("−5.5", reading.Number(-5.5)), (".5", reading.Number(0.5))],
        *[(t, None) for t in ("", "red", "3 or 4", "3, 4", "10 to 12", "2019-2020", "top 3", "12 million", "1/2",
            "May 5", "1e999")],
        *[(t, None) for t in ("two dogs and three cats", "12:30", "12k", "192.168.0.1", "not 12", "12 millions",
            "12 mil", "12 dozen")],
        *[(t, reading.Number(12)) for t in ("12 or so", "12 (approx)", "I count 12", "x=12")],
        *[(t, reading.Number(-12)) for t in ("–12", "negative 12", "minus twelve")],
        *[("ninety-nine", reading.Number(99)), ("twenty", reading.Number(20)), ("₹5", reading.Number(5, "₹"))],
        *[("$-5", reading.Number(-5, "$")), ("-$5", reading.Number(-5, "$"))],
    ],
)  # fmt: skip
def test_numbers(text, number):
    assert reading.read_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *(
            "$5 and $6",
            "2*3*4",
            "snake_case",
            "a < b",
            "well water",
            "12:30",
            "C#",
            "#1",
            "5'10\"",
            "rock'n'roll",
            "so big",
        ),
        *(
            "@home",
            "Mr. Smith",
            '"A" and "B"',
            "(555) 123-4567",
            "R&D",
            "100%",
            "in the box",
            "this",
            "x = 5",
            "it",
            "answer",
        ),
    ],
)
def test_short_answers_keep_their_own_signs(text):
    assert reading.read_short_answer(text) == text
    assert not reading.is_off_format(text, text)


def test_words():
    """Of an answer that should be one word, the first: what runs on behind it does not count, a choice of two does."""
    said = {"red": "red", "A red one": "red", "red circle red": "red", "Red.": "Red", "2 small": "2", "3.5": "3.5",
            "red, it is": "red", "-red": "red"}  # fmt: skip
    assert [reading.read_word(text) for text in said] == list(said.values())
    assert [reading.read_word(text) for text in ("red or blue", "red, blue", "red/blue", "", "?")] == [None] * 5


def test_no_short_answer():
    assert [reading.read_short_answer(text) for text in ("", " . ", "\n", "</s>", "****")] == [None] * 5


def test_the_form_of_an_answer():
    """The answer alone, or a letter and what it stands for, is what prompts ask for; what was not read has no form."""
    kept = [
        ("B", "B"),
        ("b.", "B"),
        (" B ", "B"),
        ("B. green", "B"),
        ("Yes.", "yes"),
        ("NO", "no"),
        ("Red.", "red"),
        ("?", None),
    ]
    lost = [
        ("(B)", "B"),
        ("B) green", "B"),
        ("B\nC", "B"),
        ("B. green\nC", "B"),
        ("green", "B"),
        ("Yes, it is", "yes"),
        ("**red**", "red"),
    ]
    assert not any(reading.is_off_format(text, answer) for text, answer in kept)
    assert all(reading.is_off_format(text, answer) for text, answer in lost)
    in_brackets = ("({})",)
    assert [reading.is_off_format(t, "B", in_brackets) for t in ("(B)", "(B) red", "B", "B. red")] == [0, 0, 0, 1]


def test_normalised_text():
    assert [reading.normalise(text) for text in (" Red. ", "red", "3.5", "a..")] == ["red", "red", "3.5", "a."]


@given(st.text(alphabet=string.printable + "“’：。\\{}*<>|$≈é中", max_size=60))
def test_any_text_can_be_read(text):
    """Whatever a model writes: no error, and nothing but what the reader may give."""
    assert reading.read_yes_no(text) in ("yes", "no", None)
    letter = reading.read_choice(text, OPTIONS)
    assert letter in (*OPTIONS, None)
    assert letter is None or letter in text.upper() or any(option in text.lower() for option in OPTIONS.values())
    number = reading.read_number(text)
    assert number is None or isinstance(number.value, float)
    answer = reading.read_short_answer(text)
    assert answer is None or answer.strip() == answer != ""


@given(st.sampled_from(["yes", "no"]), st.text(alphabet=string.ascii_letters + " ,", max_size=30))
def test_what_comes_after_the_first_line_does_not_count(word, more):
    assert reading.read_yes_no(f"{word}\n{more}") == word
    assert reading.read_choice(f"C\n{more}", OPTIONS) == "C"
