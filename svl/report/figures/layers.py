"""Pictures with a column for every decoder layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from svl.core import Plan, SvlError
from svl.report.figures.style import KEPT, STYLE, WIDTH, axes_at, colors, shortened, text_at, title_at_top

Plans = Sequence[Plan]  # of one method and ratio, one for each seed


def importance_rank_heatmap(plans: Mapping[str, Plans], *, jointly: Collection[str] = (), title: str = "") -> Figure:
    """Methods by layers: how important each finds every layer, as a rank, since their scales have no common unit.

    Of several seeds, ranks are means. Crosses mark the layers that the plan removes (of several, most of them).

    Args:
        plans: by label, with importance.
        jointly: labels of methods that choose layers together, whose crosses need not be at the lowest ranks.
        title: heading of the figure.

    Raises:
        SvlError: if there is no plan, or the plans are of models with different numbers of layers.
    """
    n_layers = _common_depth(plan for found in plans.values() for plan in found)
    ranks = np.array([np.mean([_ranks(plan) for plan in found], 0) for found in plans.values()])
    with mpl.rc_context(STYLE):
        names = [f"{shortened(label, 42)} †" if label in jointly else label for label in plans]
        figure, ax = _layer_grid(names, n_layers, 0.25, title, room_below=0.8 if jointly else 0.62)
        mesh = ax.pcolormesh(*_edges(ranks), ranks, cmap="viridis", vmin=0, vmax=100, ec="white", lw=0.8)
        for row, found in enumerate(plans.values()):
            removed = np.flatnonzero(_share_removed(found) > 0.5)
            for i in removed:
                color = "white" if ranks[row, i] < 60 else "black"
                ax.plot([i], [row], "x", color=color, ms=5, mew=1.4)
        ax.set_xlabel("decoder layer (crosses: removed first)")
        _add_rank_scale(figure, ax, mesh)
        if jointly:
            text = "†: layers chosen together (one block, or one after another), so crosses need not be the darkest"
            text_at(figure, 0.1, figure.get_figheight() - 0.06, text, fontsize=7.5, color="#444444")
    return figure


def _ranks(plan: Plan) -> np.ndarray:
    """Rank of every layer's importance in percent; equal values share the middle of their ranks. [n_layers]"""
    values = np.array(plan.importance)
    return np.array([100 * ((values < v).mean() + (values == v).mean() / 2) for v in values])


def _share_removed(plans: Plans) -> np.ndarray:
    """Share of the plans that remove each layer; its attention or its MLP alone is half of it. [n_layers]"""
    shares = np.zeros((len(plans), plans[0].n_layers))
    for row, plan in zip(shares, plans, strict=True):
        row[list(plan.removed)] = 1
        row[[i for i, _ in plan.sublayers]] = 0.5
    return np.array(shares.mean(0))


def _edges(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Borders of columns and rows whose centres are whole numbers."""
    rows, columns = cells.shape
    return np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5


def _add_rank_scale(figure: Figure, ax: Axes, mesh: QuadMesh) -> None:
    """The colour scale of ranks, below the axes."""
    wide, tall = figure.get_size_inches()
    box = ax.get_position()
    width = min(2.6, box.width * wide)
    left = box.x0 * wide
    top = (1 - box.y0) * tall + 0.62
    scale: Any = figure.colorbar(
        mesh, cax=axes_at(figure, left, top, width, 0.09), orientation="horizontal", ticks=[0, 50, 100]
    )
    scale.outline.set_visible(False)
    scale.ax.tick_params(labelsize=8, length=2)
    text_at(figure, left + width + 0.12, top + 0.09, "importance: rank among the layers (%)", fontsize=8, va="bottom")


def removed_layers(plans: Mapping[str, Mapping[float, Plans]], *, title: str = "") -> Figure:
    """Which layers go: a line for every method and ratio, and above, how many methods remove each layer.

    Of several seeds, the paler the fewer of them remove it. The bars count a method with the share of its seeds.

    Args:
        plans: by label and ratio.
        title: heading of the figure.

    Raises:
        SvlError: if there is no plan, or the plans are of models with different numbers of layers.
    """
    n_layers = _common_depth(plan for ratios in plans.values() for found in ratios.values() for plan in found)
    color = colors(list(plans))
    names: list[str] = []
    lines: list[np.ndarray] = []  # RGBA, [n_layers, 4]
    starts: list[int] = []  # first lines of methods
    for label, ratios in plans.items():
        starts.append(len(names))
        shades = LinearSegmentedColormap.from_list(label, [KEPT, color[label]])
        for ratio, found in sorted(ratios.items()):
            name = shortened(label, 36) if len(names) == starts[-1] else ""
            names.append(f"{name}  −{100 * ratio:g} %")
            lines.append(shades(_share_removed(found)))
    above = BARS + 0.15 if len(plans) > 1 else 0.0
    with mpl.rc_context(STYLE):
        figure, ax = _layer_grid(names, n_layers, 0.19, title, room_above=above)
        ax.pcolormesh(*_edges(np.empty((len(lines), n_layers))), np.array(lines), ec="white", lw=1)
        for start in starts[1:]:
            ax.axhline(start - 0.5, color="#888888", lw=0.8)
        is_sample = any(len(found) > 1 for ratios in plans.values() for found in ratios.values())
        ax.set_xlabel(f"decoder layer (filled: removed{', pale: by some seeds only' if is_sample else ''})")
        if above:
            _draw_counts(figure, ax, plans)
    return figure


def _draw_counts(figure: Figure, ax: Axes, plans: Mapping[str, Mapping[float, Plans]]) -> None:
    """Above the lines of methods, how many of them remove each layer, a bar for each ratio."""
    ratios = sorted({ratio for found in plans.values() for ratio in found})
    box, (wide, tall) = ax.get_position(), figure.get_size_inches()
    top = (1 - box.y1) * tall - BARS - 0.07
    counts = axes_at(figure, box.x0 * wide, top, box.width * wide, BARS)
    for i, ratio in enumerate(ratios):
        shares = [_share_removed(found[ratio]) for found in plans.values() if ratio in found]
        width = 0.84 / len(ratios)
        x = np.arange(len(shares[0])) + width * (i - (len(ratios) - 1) / 2)
        grey = f"{0.72 - 0.52 * i / max(1, len(ratios) - 1):.2f}"
        counts.bar(x, np.sum(shares, 0), width=width, color=grey, label=f"−{100 * ratio:g} %")
    counts.set_xlim(ax.get_xlim())
    counts.set_ylim(0, len(plans))
    counts.set_yticks([0, len(plans)])
    counts.set_ylabel("methods", fontsize=8)
    counts.tick_params(axis="x", bottom=False, labelbottom=False)
    counts.tick_params(axis="y", labelsize=8, length=2)
    counts.legend(fontsize=7, ncols=min(6, len(ratios)), loc="lower right", bbox_to_anchor=(1.0, 0.97), borderpad=0)


def _common_depth(plans: Iterable[Plan]) -> int:
    """The number of layers that all plans are of."""
    depths = {plan.n_layers for plan in plans}
    if len(depths) != 1:
        raise SvlError(f"a figure of layers needs plans of one model, but these have {sorted(depths)} layers")
    return depths.pop()


def _layer_grid(
    names: Sequence[str], n_layers: int, cell: float, title: str, room_below: float = 0.0, room_above: float = 0.0
) -> tuple[Figure, Axes]:
    """Axes with a line `cell` inches high for every name and a column for every layer."""
    shown = [shortened(name, 44) for name in names]
    left, bottom = 0.2 + 0.068 * max(map(len, shown)), 0.42 + room_below
    top = (0.38 if title else 0.08) + room_above
    figure = Figure(figsize=(WIDTH, top + cell * len(names) + bottom))
    ax = axes_at(figure, left, top, WIDTH - left - 0.12, cell * len(names))
    ax.set_xlim(-0.5, n_layers - 0.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    for label in ax.set_yticks(range(len(names)), shown, fontsize=8):
        label.label1.set_parse_math(False)
    ax.set_xticks(range(0, n_layers, max(1, math.ceil(n_layers / 20))))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    title_at_top(figure, title)
    return figure, ax


# ------------------------------------------------------------------------------------------------- bar charts

LEFT, RIGHT, BOTTOM = 0.95, 0.15, 0.36  # inches beside and below the blocks
BARS, STRIP, NAME, GAP = 0.8, 0.17, 0.26, 0.12  # heights within a block


def importance_bar_charts(plans: Mapping[str, Mapping[float, Plan]], *, title: str = "") -> Figure:
    """Importance of every layer (bars) and the layers removed at every ratio (strips), one block per method.

    A method without importance shows its strips only. The bars are those of the lowest ratio. A block whose largest
    importance is over 30 times its smallest positive one has a logarithmic axis.

    Args:
        plans: by label and ratio.
        title: heading of the figure.

    Raises:
        SvlError: if there is no plan, or the plans are of models with different numbers of layers.
    """
    n_layers = _common_depth(plan for ratios in plans.values() for plan in ratios.values())
    color = colors(list(plans))
    blocks = {label: dict(sorted(ratios.items())) for label, ratios in plans.items()}
    top = 0.32 if title else 0.05
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, top + sum(map(_block_height, blocks.values())) + BOTTOM))
        title_at_top(figure, title)
        y = top
        for label, ratios in blocks.items():
            text_at(figure, LEFT, y + NAME - 0.07, shortened(label), weight="bold")
            below = y + NAME
            if values := _importance(ratios):
                _draw_bars(axes_at(figure, LEFT, below, WIDTH - LEFT - RIGHT, BARS), values, color[label])
                below += BARS + 0.05
            strip = axes_at(figure, LEFT, below, WIDTH - LEFT - RIGHT, STRIP * len(ratios))
            _draw_strips(strip, ratios, color[label])
            y += _block_height(ratios)
        strip.set_xticks(range(0, n_layers, max(1, math.ceil(n_layers / 16))))
        strip.set_xlabel("decoder layer (filled: removed at that ratio)")
    return figure


def _importance(ratios: Mapping[float, Plan]) -> tuple[float, ...]:
    """That of the lowest ratio which has one."""
    return next((plan.importance for plan in ratios.values() if plan.importance), ())


def _block_height(ratios: Mapping[float, Plan]) -> float:
    """Inches that a method takes."""
    bars = BARS if _importance(ratios) else 0.0
    return NAME + bars + 0.05 + STRIP * len(ratios) + GAP


def _draw_bars(ax: Axes, values: Sequence[float], color: str) -> None:
    """A bar per layer."""
    ax.set_xlim(-0.5, len(values) - 0.5)
    ax.bar(range(len(values)), values, width=0.8, color=color, alpha=0.75)
    if min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
        ax.set_ylim(bottom=10 ** math.floor(math.log10(0.7 * min(values))))  # no bar vanishes
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


def _draw_strips(ax: Axes, ratios: Mapping[float, Plan], color: str) -> None:
    """A strip per ratio with the removed layers filled."""
    gone = np.array([_share_removed([plan]) for plan in ratios.values()])
    ax.pcolormesh(*_edges(gone), gone, cmap=ListedColormap([KEPT, color]), vmin=0, vmax=1, ec="white", lw=1)
    ax.set_xlim(-0.5, gone.shape[1] - 0.5)
    ax.invert_yaxis()
    ax.set_yticks(range(len(ratios)), [f"−{100 * ratio:g} %" for ratio in ratios], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
