"""What all figures share: size, colours, fonts, frames."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from svl.store.files import whole_file
from svl.text.escaping import for_terminal

WIDTH = 7.0  # inches of every figure
DPI = 200

# Fourteen colours that people with any colour-vision deficiency tell apart, and from black: Okabe-Ito without its
# yellow, then those that lie farthest from all before them as such people see them (Machado et al. 2009).
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F5F3F",
    "#6600CC",
    "#224444",
    "#660066",
    "#8866EE",
    "#88CC66",
    "#882200",
    "#0000EE",
)
MARKERS = (*"osD^vPX*<>phd", (4, 1, 0))  # the last: a star with four points
LINES = ("-", "--", ":")
KEPT = "#E4E4E4"
HEAT = mpl.colormaps["YlOrRd"]  # lightness falls steadily, so it also reads in grey
HEADING: Any = {"fontsize": 10, "weight": "bold", "parse_math": False}

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    color: str
    marker: str | tuple[int, int, int]
    line: str

    def curve(self) -> dict[str, Any]:
        """Settings of a line with marks."""
        return {"color": self.color, "ls": self.line, "marker": self.marker, "mec": "white", "mew": 0.6}


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """One look per label, all different; the same in every figure that is given the same labels."""
    found = {}
    for i, label in enumerate(labels):
        line = LINES[i // len(PALETTE) % len(LINES)]
        found[label] = Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], line)
    return found


def colors(labels: Sequence[str]) -> dict[str, str]:
    """The colour of each label's look."""
    return {label: look.color for label, look in looks(labels).items()}


def write_figure(figure: Figure, path: Path) -> Path:
    """Write `figure` whole, as the kind of file that the suffix says (.png, .pdf, ...); gives `path`."""
    with warnings.catch_warnings(), mpl.rc_context(STYLE), whole_file(path) as temporary:
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # exotic tokens become boxes
        figure.savefig(temporary, dpi=DPI, format=path.suffix.removeprefix("."))
    return path


def figure_with_axes(height: float) -> tuple[Figure, Axes]:
    """A figure `height` inches high with one pair of axes, laid out automatically."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def axes_at(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes whose upper left corner lies (x, y) inches from that of the figure."""
    wide, tall = figure.get_size_inches()
    return figure.add_axes((x / wide, 1 - (y + height) / tall, width / wide, height / tall))


def text_at(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text whose baseline starts (x, y) inches from the upper left corner of the figure."""
    wide, tall = figure.get_size_inches()
    figure.text(x / wide, 1 - y / tall, text, **({"parse_math": False} | style))


def title_at_top(figure: Figure, title: str) -> None:
    """The heading of a figure that is laid out in inches; it takes 0.3 of them."""
    if title:
        text_at(figure, 0.1, 0.08, shortened(title), va="top", **HEADING)


def add_title(figure: Figure, title: str) -> None:
    """Heading of a figure with curves."""
    if title:
        heading = figure.suptitle(shortened(title), x=0.01, ha="left", fontsize=10, weight="bold")
        heading.set_parse_math(False)


def shortened(text: str, most: int = 80) -> str:
    """A text in one line that fits: by default, a title's width."""
    text = " ".join(for_terminal(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


class Spread(Protocol):
    """A value between the ends of its error bar."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def bar_lengths(points: Sequence[Spread]) -> np.ndarray:
    """Lengths of error bars: [2, points], below and above."""
    return np.array([[p.value - p.low for p in points], [p.high - p.value for p in points]]).clip(min=0)
