"""Names of methods written beside their lines and points, where no legend has to be looked up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from svl.report.figures.style import Look, shortened

LABEL = 0.17  # inches that a line of text takes
FRAME = 0.95  # inches of a panel above and below its axes
SIZE = 8  # points


class LineEnd(NamedTuple):
    """Where a line ends, and what it is called."""

    x: float
    y: float
    label: str
    look: Look


def label_line_ends(ax: Axes, ends: Sequence[LineEnd], share: float = 1.0) -> None:
    """Name lines at the right of the axes, as high as they end, or as near as there is room.

    Args:
        ax: whose limits are final.
        ends: of the lines.
        share: of the figure's height that the axes' panel has.
    """
    ordered = sorted(ends, key=lambda end: end.y)
    heights = ax.transAxes.inverted().transform(ax.transData.transform([(end.x, end.y) for end in ordered]))[:, 1]
    figure: Any = ax.figure
    height = max(figure.get_figheight() * share - FRAME, 1.0)
    places = spread(heights.tolist(), LABEL / height)
    for end, place in zip(ordered, places, strict=True):
        leader: Any = {"arrowstyle": "-", "color": end.look.color, "lw": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}
        at: Any = {
            "xy": (end.x, end.y),
            "xytext": (1.03, place),
            "textcoords": "axes fraction",
            "annotation_clip": False,
        }
        ax.annotate("", arrowprops=leader, **at)
        ax.plot([1.045], [place], transform=ax.transAxes, clip_on=False, ms=5, **end.look.curve())
        text = shortened(end.label, 40)
        style: Any = {"fontsize": SIZE, "va": "center", "transform": ax.transAxes, "color": dark(end.look.color)}
        ax.text(1.065, place, text, parse_math=False, **style)


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """Ascending places, moved as little as it takes to be `gap` apart: groups that touch keep their middle."""
    groups: list[list[float]] = []  # of each, its middle and its size
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (other, m), (last, n) = groups[-2:]
            groups[-2:] = [[(other * m + last * n) / (m + n), m + n]]
    return np.array([middle + gap * (i - (n - 1) / 2) for middle, n in groups for i in range(int(n))])


def dark(color: str) -> tuple[float, ...]:
    """A colour's darker twin, in which text can be read on white."""
    return tuple(0.62 * part for part in to_rgb(color))


class PointName(NamedTuple):
    """A point, and what it is called."""

    x: float
    y: float
    text: str
    look: Look


def name_points(figure: Figure, ax: Axes, points: Sequence[PointName]) -> None:
    """Write the name of every point beside it, where it covers no other name and no point, as far as there is room."""
    figure.draw_without_rendering()  # or nothing has its place yet
    scale = figure.dpi / 72
    where = ax.transData.transform([(point.x, point.y) for point in points])
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in where]
    for point, (x, y) in zip(points, where, strict=True):
        text = shortened(point.text, 40)
        width, height = 0.58 * SIZE * len(text) * scale, 1.1 * SIZE * scale
        choices: list[tuple[float, int, int, Bbox]] = []
        for far, (side, level) in itertools.product((6, 14), itertools.product((1, -1, 0), (0, 1, -1))):
            if not side and not level:
                continue
            left = x + side * far * scale - (width if side < 0 else width / 2 if side == 0 else 0)
            bottom = y + level * far * scale - height / 2
            box = Bbox.from_bounds(left, bottom, width, height)
            choices.append((_covered(box, taken, ax.bbox), far, len(choices), box))
        box = min(choices, key=lambda choice: choice[:3])[3]
        taken.append(box)
        offset = ((box.x0 - x) / scale, (box.y0 + height / 2 - y) / scale)
        style: Any = {
            "textcoords": "offset points",
            "fontsize": SIZE - 1,
            "va": "center",
            "color": dark(point.look.color),
        }
        halo = [withStroke(linewidth=2, foreground="white")]  # names may lie on lines
        ax.annotate(text, (point.x, point.y), offset, parse_math=False, path_effects=halo, **style)


def _covered(box: Bbox, taken: Sequence[Bbox], room: Bbox) -> float:
    """How much of a box lies on others or outside of the room. [square pixels]"""
    inside = Bbox.intersection(box, room)
    area = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    for other in taken:
        if common := Bbox.intersection(box, other):
            area += common.width * common.height
    return area
