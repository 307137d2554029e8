r"""Reading an answer: the one place where what a model wrote becomes a word, a letter, a text or nothing.

All readers first take away what is form and not content (`form`): markup (`**B**`, `<b>B</b>`, ticks, `$\boxed{B}$`,
special tokens, a reasoning block), all after the first line, and words that lead to the answer ("The answer is", "It
is", "Answer:", "Based on the image,"). Of a first line that says nothing, a later one counts that says what the answer
is. Then

| reader | gives | of | None of |
|---|---|---|---|
| `read_yes_no` | "yes" or "no" | `Yes.`, `yes it is`, `It's a no`, `yes no yes` | `not sure`, `No one`, `Yes or no` |
| `read_choice` | an option's letter | `b`, `(B)`, `B :`, `B at 2`; one option's text | `A or B`, `B. No, C` |
| `read_short_answer` | a text | anything, without quotes around it and a final period | an empty answer |
| `read_word` | its first word | `a red circle` | `red or blue` |
| `read_number` | a number | `$1,200`, `about 12 %`, `There are three` | `3 or 4`, `top 3`, `12k` |

A reader gives None for what it cannot read, never a guess: such an answer is wrong. `is_off_format` tells an answer
that was read only because form was taken away.
"""

from svl.evaluation.reading.choice import LETTERS, read_choice
from svl.evaluation.reading.form import is_off_format, normalise, same_answer
from svl.evaluation.reading.open import LETTERS_OF_MULTIPLES, Number, read_number, read_short_answer, read_word
from svl.evaluation.reading.yes_no import read_yes_no

__all__ = [
    "LETTERS",
    "LETTERS_OF_MULTIPLES",
    "Number",
    "is_off_format",
    "normalise",
    "read_choice",
    "read_number",
    "read_short_answer",
    "read_word",
    "read_yes_no",
    "same_answer",
]
