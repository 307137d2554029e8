"""Token importance over a picture and its prompt."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from svl.core import SvlError
from svl.data.pictures import open_picture
from svl.report.figures.style import HEADING, HEAT, STYLE, WIDTH, axes_at, shortened, text_at

MARGIN, SPACE, LINE = 0.15, 0.25, 0.24  # inches: around, between the three pictures, of a line of tokens
PANEL = (WIDTH - 2 * MARGIN - 2 * SPACE) / 3  # width of a picture
COLUMNS = 96  # characters in a line of text tokens
MAX_LINES = 9


def token_importance(image: Path | Image.Image, example: Mapping[str, Any], *, title: str = "") -> Figure:
    """One calibration sample through the eyes of a token selector.

    The image, the scores of its visual tokens over it, the visual tokens that count, and the text tokens beneath,
    shaded by score and framed where they count.

    Args:
        image: the sample's image.
        example: `grid` [rows, cols]; `visual`, rows*cols scores; `visual_selected`, rows*cols weights in [0, 1];
            `text`, a list of [token, score, weight].
        title: heading of the figure.

    Raises:
        SvlError: if the number of visual scores does not fit the grid, or the image cannot be read.
    """
    rows, cols = example["grid"]
    for name in ("visual", "visual_selected"):
        if len(example[name]) != rows * cols:
            raise SvlError(f"example has {len(example[name])} values of '{name}' for a grid of {rows} x {cols} tokens")
    picture = open_picture(image, "the sample's image")
    sample = _Sample(
        picture,
        np.array(example["visual"], float).reshape(rows, cols),
        np.array(example["visual_selected"], float).reshape(rows, cols),
        [_Token(_readable(token), score, weight > 0) for token, score, weight in example["text"]],
    )
    panel_height = min(max(PANEL * picture.height / picture.width, 0.6), 4.0)
    top = 0.62 if title else 0.3
    text_top = top + panel_height + 0.4  # below the colour scale
    boxes = _line_up([token.word for token in sample.text])
    text_height = 0.3 + LINE * (boxes[-1].line + 1) + 0.42 if boxes else 0.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, text_top + text_height))
        if title:
            text_at(figure, MARGIN, 0.3, shortened(title), va="bottom", **HEADING)
        _draw_pictures(figure, sample, top, panel_height)
        if boxes:
            _draw_text(figure, sample.text, boxes, text_top + 0.3)
    return figure


class _Token(NamedTuple):
    """A text token as shown, its score, and whether it counts."""

    word: str
    score: float
    counts: bool


@dataclass(frozen=True)
class _Sample:
    """An image, score and weight of its visual tokens [rows, cols], and its text."""

    picture: Image.Image
    score: np.ndarray
    weight: np.ndarray
    text: list[_Token]


# ----------------------------------------------------------------------------------------------- pictures


def _draw_pictures(figure: Figure, sample: _Sample, top: float, height: float) -> None:
    """The image; the scores over it, with their scale; the tokens that count."""
    rows, cols = sample.score.shape
    share = 100 * float((sample.weight > 0).mean())
    headings = ("image", f"score of {rows} × {cols} visual tokens", f"visual tokens that count ({share:.0f} %)")
    extent = (0, sample.picture.width, sample.picture.height, 0)
    panels = []
    for i, heading in enumerate(headings):
        x = MARGIN + i * (PANEL + SPACE)
        text_at(figure, x, top - 0.06, heading, va="bottom")
        ax = axes_at(figure, x, top, PANEL, height)
        ax.set_axis_off()
        panels.append(ax)
    colored, grey = np.asarray(sample.picture), np.asarray(sample.picture.convert("L"))
    for ax, pixels in zip(panels, (colored, grey, colored), strict=True):
        ax.imshow(pixels, cmap="gray", interpolation="nearest", extent=extent)
    norm = _scale_without_extremes(sample.score.ravel())
    panels[1].imshow(sample.score, cmap=HEAT, norm=norm, alpha=0.6, interpolation="nearest", extent=extent)
    bar = axes_at(figure, MARGIN + PANEL + SPACE, top + height + 0.08, PANEL, 0.09)
    _add_color_bar(figure, bar, mpl.cm.ScalarMappable(norm, HEAT), sample.score.ravel())
    veil = np.zeros((rows, cols, 4))  # what does not count is dimmed
    veil[..., 3] = 0.82 * (1 - np.clip(sample.weight, 0, 1))
    panels[2].imshow(veil, interpolation="nearest", extent=extent)


def _scale_without_extremes(values: np.ndarray) -> Normalize:
    """A colour scale from the 2nd to the 98th percentile: one attention sink must not hide all other tokens."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [2, 98]) if finite.size else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1, clip=True)


def _add_color_bar(figure: Figure, ax: Axes, shades: Any, values: np.ndarray) -> None:
    """A horizontal colour bar; arrows where values lie outside the scale."""
    below, above = bool((values < shades.norm.vmin).any()), bool((values > shades.norm.vmax).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    bar: Any = figure.colorbar(shades, cax=ax, orientation="horizontal", extend=extend)
    bar.outline.set_visible(False)
    bar.formatter.set_powerlimits((-3, 4))
    bar.ax.locator_params(nbins=4)
    bar.ax.tick_params(labelsize=8, length=2)


# --------------------------------------------------------------------------------------------------- text


class _Box(NamedTuple):
    """Where a word stands: column in characters, and line."""

    column: float
    line: int


def _readable(token: str) -> str:
    """A token as a person reads it: a lone space is ␣, a line break ⏎, other spaces around it are dropped."""
    word = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").strip(" ") or "␣"
    word = "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in word)
    return textwrap.shorten(word, 40, placeholder="…") if " " in word else word[:40]


def _line_up(words: Sequence[str]) -> list[_Box]:
    """Places of the words in lines of COLUMNS characters, of as many as fit into MAX_LINES."""
    boxes: list[_Box] = []
    column, line = 0.0, 0
    for word in words:
        need = _columns_of(word) + 1.4
        is_last = line == MAX_LINES - 1
        if column + need > COLUMNS - (16 if is_last else 0):  # the last line has room for "and n more"
            if is_last:
                break
            column, line = 0.0, line + 1
        boxes.append(_Box(column, line))
        column += need
    return boxes


def _columns_of(word: str) -> int:
    """Width of a word in columns of a monospaced font; East Asian characters take two."""
    return max(1, sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in word))


def _draw_text(figure: Figure, text: Sequence[_Token], boxes: Sequence[_Box], top: float) -> None:
    """Text tokens in lines, shaded by score and framed where they count, with the scale below."""
    scores = np.array([token.score for token in text])
    norm = _scale_without_extremes(scores)
    counted = sum(token.counts for token in text)
    heading = f"score of {len(text)} text tokens; framed: the {counted} that count"
    text_at(figure, MARGIN, top - 0.08, heading, va="bottom")
    n_lines = boxes[-1].line + 1
    ax = axes_at(figure, MARGIN, top, WIDTH - 2 * MARGIN, LINE * n_lines)
    ax.set(xlim=(0, COLUMNS), ylim=(n_lines, 0))
    ax.set_axis_off()
    for box, token in zip(boxes, text, strict=False):
        _draw_token(ax, box, token, HEAT(0.75 * norm(token.score)))
    if len(boxes) < len(text):
        more = f"… and {len(text) - len(boxes)} more"
        ax.text(COLUMNS, boxes[-1].line + 0.5, more, ha="right", va="center", fontsize=8, color="#555555")
    shades = mpl.cm.ScalarMappable(norm, ListedColormap(HEAT(np.linspace(0, 0.75, 256))))
    _add_color_bar(figure, axes_at(figure, MARGIN, top + LINE * n_lines + 0.1, PANEL, 0.09), shades, scores)


def _draw_token(ax: Axes, box: _Box, token: _Token, color: Any) -> None:
    """One shaded word."""
    width = _columns_of(token.word) + 0.9
    edge = "#222222" if token.counts else "none"
    ax.add_patch(Rectangle((box.column + 0.1, box.line + 0.1), width, 0.8, fc=color, ec=edge, lw=1))
    style: Any = {"fontfamily": "DejaVu Sans Mono", "fontsize": 8, "color": "black" if token.counts else "#444444"}
    x, y = box.column + 0.1 + width / 2, box.line + 0.52
    ax.text(x, y, token.word, ha="center", va="center", parse_math=False, **style)
