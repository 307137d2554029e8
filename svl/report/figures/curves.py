"""Scores against ratio and speed; gaps and spectra by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from svl.report.figures.direct_labels import LABEL, LineEnd, PointName, label_line_ends, name_points
from svl.report.figures.style import (
    PALETTE,
    STYLE,
    WIDTH,
    Look,
    add_title,
    bar_lengths,
    figure_with_axes,
    looks,
    shortened,
)


class Point(NamedTuple):
    """A score of one method at one ratio.

    Attributes:
        ratio: fraction of layers removed.
        value: the score, in the unit of the figure.
        low, high: ends of its error bar.
        speed: relative to the dense model's; NaN where unknown.
        seeds: the values of single seeds, where there are several.
    """

    ratio: float
    value: float
    low: float
    high: float
    speed: float = math.nan
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Labels:
    """Heading of a figure and names of its axes."""

    title: str = ""
    ylabel: str = "average accuracy (%)"
    speed: str = "speed-up"


def accuracy_vs_ratio(curves: Mapping[str, Sequence[Point]], dense: float | None, labels: Labels = Labels()) -> Figure:
    """Average score against the fraction of layers removed, one line per method.

    Marks of different methods at one ratio stand a little beside each other, so that no error bar hides another; small
    dots are single seeds.

    Args:
        curves: by label of the method.
        dense: value of the unpruned model: ratio 0 and a dashed line; None draws neither.
        labels: heading and names.
    """
    ratios = sorted({round(100 * point.ratio, 2) for points in curves.values() for point in points} | {0.0})
    shifts = _shifts(list(curves), ratios)
    with mpl.rc_context(STYLE):
        figure, ax = figure_with_axes(max(3.9, 1.2 + LABEL * (len(curves) + 1)))
        ends: list[LineEnd] = []
        for label, look in looks(list(curves)).items():
            points = sorted(curves[label])
            x, y = [100 * point.ratio + shifts[label] for point in points], [point.value for point in points]
            ax.errorbar(x, y, bar_lengths(points), fmt="none", ecolor=look.color, elinewidth=1.2, capsize=3, zorder=3)
            _draw_seeds(ax, x, points, look)
            if dense is not None and points and points[0].ratio > 0:
                x, y = [0, *x], [dense, *y]
            marked = slice(len(x) - len(points), None)  # the dense model has its own mark
            ax.plot(x, y, ms=5.5, markevery=marked, **look.curve())
            if points:
                ends.append(LineEnd(x[-1], y[-1], label, look))
        right = ratios[-1] + max(shifts.values(), default=0.0)
        if dense is not None:
            dashed: Any = {"color": "black", "lw": 1, "ls": (0, (4, 2))}
            ax.axhline(dense, **dashed, zorder=1)
            ax.plot([0], [dense], marker="o", ms=6, **dashed, zorder=5, clip_on=False)
            ends.append(LineEnd(right, dense, "dense (none removed)", Look("black", "o", "--")))
        ticks = _ticks(ratios, [round(100 * point.ratio, 2) for points in curves.values() for point in points])
        ax.set_xticks(ticks, [f"{ratio:g}" for ratio in ticks])
        edge = 0.03 * max(ratios[-1], 1)
        ax.set_xlim(-edge, right + edge)
        ax.set_xlabel("decoder layers removed (%)")
        ax.set_ylabel(labels.ylabel)
        ax.grid(axis="y")
        add_title(figure, labels.title)
        label_line_ends(ax, ends)
    return figure


def _ticks(ratios: Sequence[float], used: Sequence[float]) -> list[float]:
    """The ratios whose numbers have room beside each other, those of most points first."""
    room = 0.05 * ratios[-1]
    ticks: list[float] = []
    for ratio in sorted(ratios, key=lambda ratio: (ratio > 0, -used.count(ratio))):
        if all(abs(ratio - other) >= room for other in ticks):
            ticks.append(ratio)
    return sorted(ticks)


def _draw_seeds(ax: Axes, x: Sequence[float], points: Sequence[Point], look: Look) -> None:
    """A small dot for the value of every seed, beneath the mean's mark."""
    for at, point in zip(x, points, strict=True):
        ax.plot([at] * len(point.seeds), point.seeds, "o", ms=3, color=look.color, mew=0, alpha=0.45, zorder=2.5)


def _shifts(labels: Sequence[str], ratios: Sequence[float]) -> dict[str, float]:
    """By how much each method's marks stand beside the ratio: a third of the room between ratios, shared by all."""
    room = min((b - a for a, b in pairwise(ratios)), default=1.0) / 3
    step = room / max(len(labels), 8)
    return {label: step * (i - (len(labels) - 1) / 2) for i, label in enumerate(labels)}


def accuracy_vs_speed(curves: Mapping[str, Sequence[Point]], dense: float | None, labels: Labels = Labels()) -> Figure:
    """Average score against speed, one mark per plan, those of a method joined in the order of their ratios.

    The grey steps are the Pareto front: what no other plan (or the dense model) beats in both.

    Args:
        curves: by label of the method; points without a speed are left out.
        dense: value of the unpruned model, drawn at 1; None draws none.
        labels: heading and names.
    """
    with mpl.rc_context(STYLE):
        figure, ax = figure_with_axes(4.4)
        every, names = [], []
        for label, look in looks(list(curves)).items():
            points = [point for point in sorted(curves[label]) if math.isfinite(point.speed)]
            x, y = [point.speed for point in points], [point.value for point in points]
            bars: Any = {"fmt": "none", "ecolor": look.color, "elinewidth": 1, "capsize": 2.5, "alpha": 0.6}
            ax.errorbar(x, y, bar_lengths(points), **bars, zorder=2)
            _draw_seeds(ax, x, points, look)
            ax.plot(x, y, lw=1, ms=6, zorder=3, **look.curve())
            every += list(zip(x, y, strict=True))
            names += [PointName(p.speed, p.value, f"{label} {100 * p.ratio:g}", look) for p in points]
        if dense is not None:
            ax.plot([1], [dense], color="black", marker="o", ms=6, ls="", zorder=5)
            names.append(PointName(1.0, dense, "dense", Look("black", "o", "-")))
            every.append((1.0, dense))
        front = pareto(every)
        ax.plot(*zip(*front, strict=True), drawstyle="steps-pre", color="#BBBBBB", lw=3.5, zorder=1, alpha=0.7)
        ax.set_xlabel(f"{labels.speed} (numbers: layers removed, %)")
        ax.set_ylabel(labels.ylabel)
        ax.grid()
        ax.margins(x=0.12)
        add_title(figure, labels.title)
        name_points(figure, ax, names)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate without losing in the other, ascending by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


class Gap(NamedTuple):
    """How far hidden states are from the dense model's: mean |h' - h|² / |h|² at each of `layers`."""

    layers: Sequence[int]
    alone: Sequence[float]  # without compensation
    patched: Sequence[float]  # with it


def feature_gap(panels: Mapping[str, Mapping[str, Gap]], *, title: str = "") -> Figure:
    """How far hidden states are from the dense model's, at every layer behind the first removed one.

    Args:
        panels: by heading and label.
        title: heading of the figure.
    """
    look = looks(list(dict.fromkeys(label for gaps in panels.values() for label in gaps)))
    with mpl.rc_context(STYLE):
        tall = max(2.7, 0.9 + LABEL * max(map(len, panels.values())))
        figure = Figure(figsize=(WIDTH, 0.5 + tall * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, (heading, gaps) in zip(axes, panels.items(), strict=True):
            ends = []
            for label, gap in gaps.items():
                ax.plot(gap.layers, gap.alone, color=look[label].color, ls=(0, (3, 2)), lw=1)
                ax.plot(gap.layers, gap.patched, ms=4, lw=1.3, **look[label].curve())
                ends.append(LineEnd(gap.layers[-1], gap.patched[-1], label, look[label]))
            _scale_gap_axis(ax, [y for gap in gaps.values() for y in (*gap.alone, *gap.patched)])
            ax.set_title(shortened(heading), loc="left", fontsize=9).set_parse_math(False)
            ax.set_ylabel("mean |h′ − h|² / |h|²")
            ax.set_xlabel("state before layer (the last: after all layers)")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(axis="y")
            label_line_ends(ax, ends, share=1 / len(panels))
        add_title(figure, title)
    return figure


def _scale_gap_axis(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where the largest value is over 20 times the smallest, else one from 0."""
    if max(values) > 20 * min(values) > 0:
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, 1.08 * max(values) or 1)


class Spectrum(NamedTuple):
    """Singular values of a gap: the largest ones, descending; the sum of the squares of all; how many are used."""

    values: Sequence[float]
    squares: float
    rank: int

    @property
    def share(self) -> float:
        """Part of the squares that the directions in use hold."""
        used = sum(value * value for value in self.values[: self.rank])
        return used / self.squares if self.squares else 0.0


def spectrum(panels: Mapping[str, Mapping[str, Spectrum]], *, title: str = "") -> Figure:
    """What a subspace compensation sees: the singular values of the feature gaps beside every changed layer.

    Args:
        panels: by heading and label.
        title: heading of the figure.
    """
    across = 1 if len(panels) == 1 else 2
    down = math.ceil(len(panels) / across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 2.9 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        for ax, (heading, spectra) in zip(axes, panels.items(), strict=False):
            for i, (label, found) in enumerate(spectra.items()):
                color = PALETTE[i % len(PALETTE)]
                relative = np.array(found.values) / found.values[0]
                ax.plot(range(1, len(relative) + 1), relative, color=color, lw=1.1, marker=".", ms=3)
                text = f"{label}: first {found.rank} hold {100 * found.share:.0f} %"
                ax.plot([], [], color=color, marker="o", ls="", ms=4, label=text)
                ax.axvline(found.rank + 0.5, color="#999999", lw=0.8, ls=(0, (2, 2)), zorder=0)
            ax.set(xscale="log", yscale="log", xlabel="direction", ylabel="singular value / largest")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_title(shortened(heading), loc="left", fontsize=9).set_parse_math(False)
            ax.grid()
            ax.legend(fontsize=7, handlelength=0.8, loc="lower left")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        add_title(figure, title)
    return figure
