"""Scores against what recovery cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from svl.report.figures.curves import Labels
from svl.report.figures.direct_labels import FRAME, LABEL, LineEnd, label_line_ends
from svl.report.figures.style import STYLE, WIDTH, Look, add_title, bar_lengths, looks, shortened

UNTRAINED = "#777777"
LEVELS = ((0, (1, 1.5)), (0, (5, 2)))  # lines of the untrained: without compensation, and with one


class Cost(NamedTuple):
    """A score after so much training (steps or seconds; 0: none), with the ends of its error bar."""

    spent: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Training:
    """One way of training the same layers for different budgets.

    Attributes:
        method: its name, which gives the colour.
        after: the compensation that it starts from; empty: none.
        points: ascending by what was spent.
    """

    method: str
    after: str
    points: tuple[Cost, ...]


@dataclass(frozen=True)
class Panel:
    """What is compared: ways of training, and by compensation (empty: none), the score without training."""

    curves: Sequence[Training]
    untrained: Mapping[str, float]


def accuracy_vs_training(panels: Mapping[str, Panel], dense: float | None, unit: str, labels: Labels) -> Figure:
    """Score against the budget of recovery: solid where it starts from a compensation, dashed where not.

    Horizontal lines are the dense model, and pruned ones without training. The axis is linear up to the smallest
    budget, and logarithmic from there.

    Args:
        panels: by heading.
        dense: value of the unpruned model; None draws none.
        unit: of what is spent ("steps").
        labels: heading and name of the axis of scores.
    """
    look = looks(list(dict.fromkeys(curve.method for panel in panels.values() for curve in panel.curves)))
    with mpl.rc_context(STYLE):
        lines = max(len(panel.curves) + len(panel.untrained) + 1 for panel in panels.values())
        tall = max(3.6, FRAME + 0.3 + LABEL * lines)
        figure = Figure(figsize=(WIDTH, 0.3 + tall * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, (heading, panel) in zip(axes, panels.items(), strict=True):
            ends = [_draw_curve(ax, curve, look[curve.method]) for curve in panel.curves]
            _scale_budgets(ax, panel)
            right = max(end.x for end in ends)
            ends += [_draw_level(ax, right, *level) for level in _levels(panel, dense)]
            ax.set_title(shortened(heading), loc="left", fontsize=9).set_parse_math(False)
            ax.set_xlabel(unit)
            ax.set_ylabel(labels.ylabel)
            label_line_ends(ax, ends, share=1 / len(panels))
        add_title(figure, labels.title)
    return figure


def _draw_curve(ax: Axes, curve: Training, method: Look) -> LineEnd:
    look = Look(method.color, method.marker, "-" if curve.after else "--")
    x, y = [point.spent for point in curve.points], [point.value for point in curve.points]
    bars: Any = {"fmt": "none", "ecolor": look.color, "elinewidth": 1, "capsize": 2, "alpha": 0.5}
    ax.errorbar(x, y, bar_lengths(curve.points), **bars, zorder=2)
    trained = [i for i, spent in enumerate(x) if spent]  # what they start from has its own line
    ax.plot(x, y, lw=1.5, ms=5.5, markevery=trained, zorder=3, **look.curve())
    return LineEnd(x[-1], y[-1], f"{curve.method} after {curve.after}" if curve.after else curve.method, look)


def _scale_budgets(ax: Axes, panel: Panel) -> None:
    spent = sorted({point.spent for curve in panel.curves for point in curve.points} | {0.0})
    ax.set_xscale("symlog", linthresh=spent[1], linscale=0.6)
    ticks = spent[:2]
    for value in spent[2:]:
        if value > 1.3 * ticks[-1]:  # seconds of several runs are never the same
            ticks.append(value)
    ax.set_xticks(ticks, [f"{value:,.0f}" for value in ticks])
    ax.minorticks_off()
    ax.set_xlim(-0.05 * spent[1], 1.06 * spent[-1])
    ax.grid(axis="y")


def _levels(panel: Panel, dense: float | None) -> list[tuple[float, str, Look]]:
    """The horizontal lines: value, name, look."""
    found: list[tuple[float, str, Look]] = []
    for compensation, value in panel.untrained.items():
        name = f"{compensation}, no training" if compensation else "no training"
        found.append((value, name, Look(UNTRAINED, "", LEVELS[bool(compensation)])))  # type: ignore[arg-type]
    if dense is not None:
        found.append((dense, "dense (none removed)", Look("black", "", "-")))
    return found


def _draw_level(ax: Axes, right: float, value: float, name: str, look: Look) -> LineEnd:
    style: Any = {"color": look.color, "ls": look.line, "lw": 1.1, "zorder": 1}
    ax.axhline(value, **style)
    return LineEnd(right, value, name, look)
