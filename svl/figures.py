"""The figures of a report, drawn from plain numbers.

`matplotlib.figure.Figure` objects without pyplot, so no global state and no display. Colours are told apart by people
with colour-vision deficiencies (Okabe-Ito), and never carry a meaning alone. Sizes are chosen for a width of 1000
pixels or one text column of a paper.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from svl.core import Plan, SvlError

WIDTH = 7.0  # inches of every figure
DPI = 200
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5F3F")  # Okabe-Ito, no yellow
MARKERS = "osD^vPX*"
KEPT = "#E4E4E4"
HEAT = mpl.colormaps["YlOrRd"]  # lightness falls steadily, so it also reads in grey

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


def colors(labels: Sequence[str]) -> dict[str, str]:
    """One colour per label, the same in every figure that is given the same labels."""
    return dict(zip(labels, islice(cycle(PALETTE), len(labels)), strict=True))


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as the kind of file its suffix says (.png, .pdf, ...); gives `path`."""
    with warnings.catch_warnings(), mpl.rc_context(STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # exotic tokens become boxes
        figure.savefig(path, dpi=DPI)
    return path


def accuracy_vs_ratio(
    curves: Mapping[str, Sequence[tuple[float, float, float | None]]],
    dense: float | None,
    *,
    title: str = "",
    ylabel: str = "average accuracy (%)",
) -> Figure:
    """Average score against the fraction of layers removed, one line per method.

    Args:
        curves: by label, points (ratio in [0, 1), value, error or None), values in the unit of `ylabel`.
        dense: value of the unpruned model: ratio 0 and a dashed line; None draws neither.
        title: heading of the figure.
        ylabel: name and unit of the values.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        ax = figure.add_subplot()
        color = colors(list(curves))
        lines = []
        for i, (label, points) in enumerate(curves.items()):
            points = sorted(points)
            x, y = [100 * p[0] for p in points], [p[1] for p in points]
            error = [p[2] or 0 for p in points]
            ax.errorbar(x, y, error, fmt="none", ecolor=color[label], elinewidth=1.2, capsize=3, zorder=3)
            if dense is not None and points and points[0][0] > 0:
                x, y = [0, *x], [dense, *y]
            style: Any = {
                "color": color[label],
                "ls": ("-", "--", ":")[i // len(PALETTE) % 3],
                "marker": MARKERS[i % len(MARKERS)],
                "markevery": slice(len(x) - len(points), None),  # the dense model has its own marker
            }
            (line,) = ax.plot(x, y, ms=5.5, mec="white", mew=0.6, **style)
            lines.append((y[-1] if y else -math.inf, label, line))
        handles, names = [], []
        if dense is not None:
            look: Any = {"color": "black", "lw": 1, "ls": (0, (4, 2)), "marker": "o", "ms": 6}
            ax.axhline(dense, **look | {"marker": ""}, zorder=1)
            (dot,) = ax.plot([0], [dense], **look, zorder=5, clip_on=False)
            handles, names = [dot], ["dense (none removed)"]
        for _, label, line in sorted(lines, key=lambda item: -item[0]):  # as the line ends lie, top to bottom
            handles.append(line)
            names.append(label)
        ratios = sorted({round(100 * p[0], 2) for points in curves.values() for p in points} | {0.0})
        ax.set_xticks(ratios, [f"{r:g}" for r in ratios])
        ax.set_xlim(-0.03 * max(ratios[-1], 1), 1.05 * max(ratios[-1], 1))
        ax.set_xlabel("decoder layers removed (%)")
        ax.set_ylabel(ylabel)
        ax.grid(axis="y")
        _frame(figure, title, handles, names)
    return figure


def accuracy_vs_speed(
    curves: Mapping[str, Sequence[tuple[float, float, float | None, float]]],
    dense: float | None,
    *,
    title: str = "",
    xlabel: str = "speed-up",
    ylabel: str = "average accuracy (%)",
) -> Figure:
    """Average score against speed, one mark per plan, those of a method joined in the order of their ratios.

    The grey steps are the Pareto front: what no other plan (or the dense model) beats in both.

    Args:
        curves: by label, points (speed relative to the dense model, value, error or None, ratio).
        dense: value of the unpruned model, drawn at 1; None draws none.
        title: heading of the figure.
        xlabel: what the speed is.
        ylabel: name and unit of the values.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        ax = figure.add_subplot()
        color = colors(list(curves))
        handles, names = [], []
        for i, (label, points) in enumerate(curves.items()):
            ordered = sorted(points, key=lambda p: p[3])
            x, y = [p[0] for p in ordered], [p[1] for p in ordered]
            error = [p[2] or 0 for p in ordered]
            ax.errorbar(x, y, error, fmt="none", ecolor=color[label], elinewidth=1, capsize=2.5, alpha=0.6, zorder=2)
            (line,) = ax.plot(
                x, y, color=color[label], ls=("-", "--", ":")[i // len(PALETTE) % 3], lw=1,
                marker=MARKERS[i % len(MARKERS)], ms=6, mec="white", mew=0.6, zorder=3,
            )  # fmt: skip
            for px, py, _, ratio in ordered:
                place = (5, (3, -9)[i % 2])  # neighbours write above and below
                text = f"{100 * ratio:g}"
                ax.annotate(text, (px, py), place, textcoords="offset points", fontsize=7, color=color[label])
            handles.append(line)
            names.append(label)
        every = [(p[0], p[1]) for points in curves.values() for p in points] + ([(1.0, dense)] if dense else [])
        front = pareto(every)
        ax.plot(*zip(*front, strict=True), drawstyle="steps-pre", color="#BBBBBB", lw=3.5, zorder=1, alpha=0.7)
        if dense is not None:
            (dot,) = ax.plot([1], [dense], color="black", marker="o", ms=6, ls="", zorder=5)
            handles, names = [dot, *handles], ["dense", *names]
        ax.set_xlabel(f"{xlabel} (small numbers: layers removed, %)")
        ax.set_ylabel(ylabel)
        ax.grid()
        _frame(figure, title, handles, names)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate without losing in the other, ascending by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def _frame(figure: Figure, title: str, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Heading and legend of a figure with curves."""
    if title:
        heading = figure.suptitle(_short(title), x=0.01, ha="left", fontsize=10, weight="bold")
        heading.set_parse_math(False)
    if handles:
        legend = figure.legend(handles, names, loc="outside right upper")
        for text in legend.get_texts():
            text.set_parse_math(False)


def importance_map(plans: Mapping[str, Plan], *, title: str = "") -> Figure:
    """Strategies by layers: how important each finds every layer, as a rank, since their scales have no common unit.

    Crosses mark the layers that the plan removes.

    Args:
        plans: one by label, with importance.
        title: heading of the figure.

    Raises:
        SvlError: if there is no plan, or the plans are of models with different numbers of layers.
    """
    n_layers = _depth(plans.values())
    ranks = []
    for plan in plans.values():
        values = np.array(plan.importance)
        ranks.append([100 * float((values < v).mean() + (values == v).mean() / 2) for v in values])
    cell, bar = 0.25, 0.62
    with mpl.rc_context(STYLE):
        figure, ax = _grid(list(plans), n_layers, cell, title, bar)
        edges = (np.arange(n_layers + 1) - 0.5, np.arange(len(plans) + 1) - 0.5)
        mesh = ax.pcolormesh(*edges, np.array(ranks), cmap="viridis", vmin=0, vmax=100, ec="white", lw=0.8)
        for row, plan in enumerate(plans.values()):
            dark = [i for i in plan.removed if ranks[row][i] < 60]
            for chosen, color in ((dark, "white"), (sorted(set(plan.removed) - set(dark)), "black")):
                ax.plot(chosen, [row] * len(chosen), "x", color=color, ms=5, mew=1.4)
        ax.set_xlabel("decoder layer (crosses: removed first)")
        width, height = figure.get_size_inches()
        box = ax.get_position()
        shades = figure.add_axes((box.x0, 0.3 / height, min(2.6 / width, box.width), 0.09 / height))
        made: Any = figure.colorbar(mesh, cax=shades, orientation="horizontal", ticks=[0, 50, 100])
        made.outline.set_visible(False)
        made.ax.tick_params(labelsize=8, length=2)
        figure.text(
            box.x0 + min(2.6 / width, box.width) + 0.12 / width, 0.3 / height,
            "importance: rank among the layers (%)", fontsize=8, va="bottom",
        )  # fmt: skip
    return figure


def removed_layers(plans: Mapping[str, Mapping[float, Plan]], *, title: str = "") -> Figure:
    """Which layers go, a line for every method and ratio.

    Args:
        plans: by label and ratio.
        title: heading of the figure.

    Raises:
        SvlError: if there is no plan, or the plans are of models with different numbers of layers.
    """
    n_layers = _depth([plan for by_ratio in plans.values() for plan in by_ratio.values()])
    color = colors(list(plans))
    names, gone, shades = [], [], []
    for label, by_ratio in plans.items():
        for i, (ratio, plan) in enumerate(sorted(by_ratio.items())):
            names.append(f"{_short(label, 36) if i == 0 else ''}  −{100 * ratio:g} %")
            gone.append([layer in plan.removed for layer in range(n_layers)])
            shades.append(color[label])
    with mpl.rc_context(STYLE):
        figure, ax = _grid(names, n_layers, 0.19, title)
        for row, (line, shade) in enumerate(zip(gone, shades, strict=True)):
            for layer, removed in enumerate(line):
                face = shade if removed else KEPT
                ax.add_patch(Rectangle((layer - 0.5, row - 0.5), 1, 1, fc=face, ec="white", lw=1))
        for row, name in enumerate(names):
            if row and not name.startswith("  "):
                ax.axhline(row - 0.5, color="#888888", lw=0.8)
        ax.set_xlabel("decoder layer (filled: removed)")
    return figure


def _depth(plans: Iterable[Plan]) -> int:
    """The number of layers that all plans are of."""
    depths = {plan.n_layers for plan in plans}
    if len(depths) != 1:
        raise SvlError(f"a figure of layers needs plans of one model, but these have {sorted(depths)} layers")
    return depths.pop()


def _grid(names: Sequence[str], n_layers: int, cell: float, title: str, below: float = 0.0) -> tuple[Figure, Axes]:
    """Axes with a line `cell` inches high for every name, a column for every layer, and room below."""
    shown = [_short(name, 44) for name in names]
    left, top, bottom = 0.2 + 0.068 * max(map(len, shown)), 0.38 if title else 0.08, 0.42 + below
    height = top + cell * len(names) + bottom
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.add_axes((left / WIDTH, bottom / height, (WIDTH - left - 0.12) / WIDTH, cell * len(names) / height))
    ax.set_xlim(-0.5, n_layers - 0.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    for label in ax.set_yticks(range(len(names)), shown, fontsize=8):
        label.label1.set_parse_math(False)
    ax.set_xticks(range(0, n_layers, max(1, math.ceil(n_layers / 20))))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if title:
        y = 1 - 0.08 / height
        figure.text(0.1 / WIDTH, y, _short(title), va="top", fontsize=10, weight="bold", parse_math=False)
    return figure, ax


def feature_gap(
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]], *, title: str = ""
) -> Figure:
    """How far hidden states are from the dense model's, at every layer behind the first removed one.

    Args:
        panels: by heading and label, (layers, error without compensation, error with it); errors are mean
            |h' - h|² / |h|².
        title: heading of the figure.
    """
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    color = colors(labels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 2.7 * len(panels)), layout="constrained")
        lines: dict[str, Any] = {}
        for ax, (heading, curves) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(),
                                         strict=True):  # fmt: skip
            for label, (layers, before, after) in curves.items():
                mark = MARKERS[labels.index(label) % len(MARKERS)]
                ax.plot(layers, before, color=color[label], ls=(0, (3, 2)), lw=1)
                (lines[label],) = ax.plot(layers, after, color=color[label], marker=mark, ms=4, lw=1.3)
            every = [y for _, before, after in curves.values() for y in (*before, *after)]
            if max(every) > 20 * min(every) > 0:
                ax.set_yscale("log")
            else:
                ax.set_ylim(0, 1.08 * max(every) or 1)
            ax.set_title(heading, loc="left", fontsize=9)
            ax.set_ylabel("mean |h′ − h|² / |h|²")
            ax.set_xlabel("state before layer (the last: after all layers)")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(axis="y")
        (plain,) = ax.plot([], [], color="#555555", ls=(0, (3, 2)), lw=1)
        _frame(figure, title, [plain, *lines.values()], ["without compensation", *lines])
    return figure


def spectrum(panels: Mapping[str, Mapping[str, tuple[Sequence[float], float, int]]], *, title: str = "") -> Figure:
    """What a subspace compensation sees: the singular values of the feature gaps beside every changed layer.

    Args:
        panels: by heading and label, (values, descending; sum of the squares of all values, also of those not given;
            number of directions used).
        title: heading of the figure.
    """
    across = 1 if len(panels) == 1 else 2
    down = math.ceil(len(panels) / across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 2.9 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        for ax, (heading, curves) in zip(axes, panels.items(), strict=False):
            for i, (label, (values, squares, rank)) in enumerate(curves.items()):
                share = 100 * sum(v * v for v in values[:rank]) / squares if squares else 0
                color = PALETTE[i % len(PALETTE)]
                x = range(1, len(values) + 1)
                ax.plot(x, np.array(values) / values[0], color=color, lw=1.1, marker=".", ms=3)
                ax.plot([], [], color=color, marker="o", ls="", ms=4, label=f"{label}: first {rank} hold {share:.0f} %")
                ax.axvline(rank + 0.5, color="#999999", lw=0.8, ls=(0, (2, 2)), zorder=0)
            ax.set(xscale="log", yscale="log", xlabel="direction", ylabel="singular value / largest")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_title(heading, loc="left", fontsize=9).set_parse_math(False)
            ax.grid()
            ax.legend(fontsize=7, handlelength=0.8, loc="lower left")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        _frame(figure, title, [], [])
    return figure


def importance(plans: Mapping[str, Mapping[float, Plan]], *, title: str = "") -> Figure:
    """Importance of every layer (bars) and the layers removed at every ratio (strips), one block per method.

    A method without importance shows its strips only. The bars are those of the lowest ratio. A block whose largest
    importance is over 30 times its smallest positive one has a logarithmic axis.

    Args:
        plans: by label and ratio.
        title: heading of the figure.

    Raises:
        SvlError: if there is no plan, or the plans are of models with different numbers of layers.
    """
    n_layers = _depth(plan for by_ratio in plans.values() for plan in by_ratio.values())
    left, right, bars, cell, head, gap, bottom = 0.95, 0.15, 0.8, 0.17, 0.26, 0.12, 0.36  # inches
    blocks = {k: [p for _, p in sorted(v.items())] for k, v in plans.items()}
    heights = {k: head + bars * any(p.importance for p in v) + 0.05 + cell * len(v) + gap for k, v in blocks.items()}
    top = 0.32 if title else 0.05
    height = top + sum(heights.values()) + bottom
    color = colors(list(plans))

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def axes(y: float, tall: float) -> Axes:
            """Axes `tall` inches high, their upper edge `y` inches below that of the figure."""
            width = (WIDTH - left - right) / WIDTH
            ax = figure.add_axes((left / WIDTH, 1 - (y + tall) / height, width, tall / height))
            ax.set_xlim(-0.5, n_layers - 0.5)
            return ax

        if title:
            figure.text(
                0.1 / WIDTH, 1 - 0.08 / height, _short(title), va="top", fontsize=10, weight="bold", parse_math=False
            )
        y = top
        for label, by_ratio in plans.items():
            ordered = blocks[label]
            name_at = 1 - (y + head - 0.07) / height
            figure.text(left / WIDTH, name_at, label, weight="bold", parse_math=False)
            y_next, y = y + heights[label], y + head
            values = next((p.importance for p in ordered if p.importance), ())
            if values:
                ax = axes(y, bars)
                ax.bar(range(n_layers), values, width=0.8, color=color[label], alpha=0.75)
                positive = [v for v in values if v > 0]
                if len(positive) == n_layers and max(positive) > 30 * min(positive):
                    ax.set_yscale("log")
                    ax.set_ylim(bottom=10 ** math.floor(math.log10(0.7 * min(positive))))  # no bar vanishes
                    ax.yaxis.set_major_locator(LogLocator(numticks=6))
                    ax.yaxis.set_major_formatter("{x:g}")
                    ax.yaxis.set_minor_formatter(NullFormatter())
                    ax.set_ylabel("importance\n(log)", fontsize=8)
                else:
                    ax.set_ylabel("importance", fontsize=8)
                    ax.locator_params(axis="y", nbins=4)
                ax.tick_params(axis="x", bottom=False, labelbottom=False)
                ax.tick_params(axis="y", labelsize=8)
                ax.grid(axis="y")
                y += bars + 0.05
            strip = axes(y, cell * len(ordered))
            gone = np.array([[i in p.removed for i in range(n_layers)] for p in ordered])
            edges = (np.arange(n_layers + 1) - 0.5, np.arange(len(ordered) + 1) - 0.5)
            strip.pcolormesh(*edges, gone, cmap=ListedColormap([KEPT, color[label]]), vmin=0, vmax=1, ec="white", lw=1)
            strip.invert_yaxis()
            strip.set_yticks(range(len(ordered)), [f"−{100 * r:g} %" for r in sorted(by_ratio)], fontsize=8)
            strip.tick_params(length=0)
            strip.spines[:].set_visible(False)
            strip.set_xticks([])
            y = y_next
        step = max(1, math.ceil(n_layers / 16))
        strip.set_xticks(range(0, n_layers, step))
        strip.set_xlabel("decoder layer (filled: removed at that ratio)")
    return figure


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
        SvlError: if the number of visual scores does not fit the grid.
    """
    rows, cols = example["grid"]
    for name in ("visual", "visual_selected"):
        if len(example[name]) != rows * cols:
            raise SvlError(f"example has {len(example[name])} values of '{name}' for a grid of {rows} x {cols} tokens")
    score = np.array(example["visual"], float).reshape(rows, cols)
    weight = np.array(example["visual_selected"], float).reshape(rows, cols)
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            image = file.copy()
    picture = np.asarray(image.convert("RGB"))
    grey = np.asarray(image.convert("L"))
    tall, wide = grey.shape

    text = example["text"]
    boxes, n_lines = _flow([readable(token) for token, _, _ in text])
    margin, space, line = 0.15, 0.25, 0.24  # inches
    panel = (WIDTH - 2 * margin - 2 * space) / 3
    panel_tall = min(max(panel * tall / wide, 0.6), 4.0)
    top, bar, heading = (0.62 if title else 0.3), 0.4, 0.3 if text else 0.0
    text_at = top + panel_tall + bar + heading
    height = text_at + line * n_lines + (0.42 if text else 0)

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def axes(x: float, y: float, w: float, h: float) -> Axes:
            """Axes at (x, y) inches from the upper left corner, w x h inches."""
            return figure.add_axes((x / WIDTH, 1 - (y + h) / height, w / WIDTH, h / height))

        def write(x: float, y: float, words: str, **style: Any) -> None:
            figure.text(x / WIDTH, 1 - y / height, words, va="bottom", parse_math=False, **style)

        if title:
            write(margin, 0.3, _short(title), fontsize=10, weight="bold")
        extent = (0, wide, tall, 0)
        share = 100 * float((weight > 0).mean())
        headings = ("image", f"score of {rows} × {cols} visual tokens", f"visual tokens that count ({share:.0f} %)")
        for i, name in enumerate(headings):
            x = margin + i * (panel + space)
            write(x, top - 0.06, name)
            ax = axes(x, top, panel, panel_tall)
            ax.set_axis_off()
            ax.imshow(picture if i != 1 else grey, cmap="gray", interpolation="nearest", extent=extent)
            if i == 1:
                norm = _robust(score.ravel())
                ax.imshow(score, cmap=HEAT, norm=norm, alpha=0.6, interpolation="nearest", extent=extent)
                shades = mpl.cm.ScalarMappable(norm, HEAT)
                _color_bar(figure, axes(x, top + panel_tall + 0.08, panel, 0.09), shades, score.ravel())
            if i == 2:  # what does not count is dimmed
                veil = np.zeros((rows, cols, 4))
                veil[..., 3] = 0.82 * (1 - np.clip(weight, 0, 1))
                ax.imshow(veil, interpolation="nearest", extent=extent)
        if text:
            scores = np.array([s for _, s, _ in text], float)
            norm = _robust(scores)
            counted = sum(w > 0 for _, _, w in text)
            write(margin, text_at - 0.08, f"score of {len(text)} text tokens; framed: the {counted} that count")
            ax = axes(margin, text_at, WIDTH - 2 * margin, line * n_lines)
            ax.set(xlim=(0, COLUMNS), ylim=(n_lines, 0))
            ax.set_axis_off()
            for (column, row, word), (_, value, counts) in zip(boxes, text, strict=False):
                _token(ax, column, row, word, HEAT(0.75 * norm(value)), counts > 0)
            if len(boxes) < len(text):
                column, row, word = boxes[-1]
                more = f"… and {len(text) - len(boxes)} more"
                ax.text(COLUMNS, row + 0.5, more, ha="right", va="center", fontsize=8, color="#555555")
            shades = mpl.cm.ScalarMappable(norm, ListedColormap(HEAT(np.linspace(0, 0.75, 256))))
            _color_bar(figure, axes(margin, text_at + line * n_lines + 0.1, panel, 0.09), shades, scores)
    return figure


COLUMNS = 96  # characters in a line of text tokens
MAX_LINES = 9


def _short(text: str, most: int = 80) -> str:
    """A text that fits: by default, a title's width."""
    return text if len(text) <= most else text[: most - 1] + "…"


def readable(token: str) -> str:
    """A token as a person reads it: a lone space is ␣, a line break ⏎, other spaces around it are dropped."""
    word = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").strip(" ") or "␣"
    word = "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in word)
    return textwrap.shorten(word, 40, placeholder="…") if " " in word else word[:40]


def _flow(words: Sequence[str]) -> tuple[list[tuple[float, int, str]], int]:
    """Set words in lines of COLUMNS characters: (column, line, word) each, and the number of lines."""
    boxes: list[tuple[float, int, str]] = []
    column, row = 0.0, 0
    for word in words:
        need = _cells(word) + 1.4
        last = row == MAX_LINES - 1  # leaves room for "and n more"
        if column + need > COLUMNS - 16 * last:
            if last:
                break
            column, row = 0.0, row + 1
        boxes.append((column, row, word))
        column += need
    return boxes, row + 1 if words else 0


def _cells(word: str) -> int:
    """Width of a word in columns of a monospaced font; East Asian characters take two."""
    return max(1, sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in word))


def _token(ax: Axes, column: float, row: int, word: str, color: Any, framed: bool) -> None:
    """One shaded word."""
    width = _cells(word) + 0.9
    edge = "#222222" if framed else "none"
    ax.add_patch(Rectangle((column + 0.1, row + 0.1), width, 0.8, fc=color, ec=edge, lw=1))
    style: Any = {"fontfamily": "DejaVu Sans Mono", "fontsize": 8, "color": "black" if framed else "#444444"}
    ax.text(column + 0.1 + width / 2, row + 0.52, word, ha="center", va="center", parse_math=False, **style)


def _robust(values: np.ndarray) -> Normalize:
    """A colour scale from the 2nd to the 98th percentile: one attention sink must not hide all other tokens."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [2, 98]) if finite.size else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1, clip=True)


def _color_bar(figure: Figure, ax: Axes, shades: Any, values: np.ndarray) -> None:
    """A horizontal colour bar; arrows where values lie outside the scale."""
    below, above = bool((values < shades.norm.vmin).any()), bool((values > shades.norm.vmax).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    bar: Any = figure.colorbar(shades, cax=ax, orientation="horizontal", extend=extend)
    bar.outline.set_visible(False)
    bar.formatter.set_powerlimits((-3, 4))
    bar.ax.locator_params(nbins=4)
    bar.ax.tick_params(labelsize=8, length=2)
