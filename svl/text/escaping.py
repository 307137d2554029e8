"""Text from outside (model output, file names, data, settings) made safe for where it is shown.

Each function takes any value and gives text that can do nothing there but be read: no escape sequence, no markup, no
link, no formula. Everything that svl writes for people passes one of them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

_MARKUP = re.compile(r"([\\`*_\[\]|!#~])")
_LATEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "±": "$\\pm$", "×": "$\\times$", "–": "--", "−": "$-$", "…": "\\dots{}", '"': "''",
}  # fmt: skip


def _visible(text: str, keep: str) -> str:
    """`text` with control and direction-changing characters, but for those in `keep`, written as escapes."""
    letters = []
    for letter in text:
        if letter not in keep and unicodedata.category(letter) in ("Cc", "Cf", "Cs"):
            letter = letter.encode("unicode_escape", "surrogatepass").decode()
        letters.append(letter)
    return "".join(letters)


def for_terminal(value: Any) -> str:
    """Text for a terminal or a log: control characters show as escapes, lines stay lines."""
    return _visible(str(value), "\n\t\u200d")


def for_markdown(value: Any, limit: int | None = None) -> str:
    """Text for one line of Markdown, such as a table's cell: no markup, HTML, link or image; at most `limit` letters.

    Lines are joined by ⏎.
    """
    lines = (line.strip() for line in str(value).strip().splitlines())
    text = _visible(" ⏎ ".join(line for line in lines if line), "\u200d")[:limit]
    text = _MARKUP.sub(r"\\\1", html.escape(text, quote=False))
    return text.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def for_html(value: Any) -> str:
    """Text for HTML, in content and in quoted attributes."""
    return html.escape(_visible(str(value), "\n\t\u200d"))


def for_latex(value: Any) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(letter, letter) for letter in _visible(str(value), "\n\u200d"))


def for_csv(value: Any) -> str:
    """Text for a cell of a table that spreadsheets open: never a formula."""
    text = _visible(str(value), "\n\t\u200d")
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
