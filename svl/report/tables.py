"""The table of a section: cells first, apart from how they are written (svl.report.table_writers).

A cell has its text, the number behind it, its error, and whether it is the best at its ratio. Measured columns and
the paper's are groups of their own, which every way of writing keeps apart and names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from svl.report import paper
from svl.report.notes import table_notes
from svl.report.rows import Estimate, Row, Section
from svl.report.significance import is_significantly_different
from svl.store.artifacts import Store

MEASURED, PAPER = "measured", "paper"


class Cell(NamedTuple):
    """What is written, the value and error behind it (in the unit of the column), and whether no rival beats it."""

    text: str
    value: float | str | None = None
    error: float | None = None
    best: bool = False


UNKNOWN = Cell("–")
SHORT_METRICS = {"accuracy": "acc", "exact_match": "EM", "relaxed_overall": "relaxed acc", "perplexity": "ppl"}


@dataclass(frozen=True)
class Column:
    """Name, unit ("%" or none) and group: MEASURED, PAPER, or none for what a row is about."""

    name: str
    unit: str = ""
    group: str = ""
    lower_is_better: bool = False
    is_score: bool = False  # so it has an error and a best value
    task: str | None = None  # what the scores are of; None: the average over all

    @property
    def head(self) -> str:
        """Name and unit."""
        marked = f"{PAPER}: {self.name}" if self.group == PAPER else self.name
        return f"{marked} {self.unit}".strip()


class Line(NamedTuple):
    """A line of a table: its row (None: the dense model) and its cells."""

    row: Row | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Columns, lines (the dense model first), and notes below."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def blocks(self) -> Iterator[list[tuple[Cell, ...]]]:
        """The cells of one ratio after another's."""
        for _, block in groupby(self.lines, lambda line: line.row and line.row.ratio):
            yield [line.cells for line in block]


def section_table(section: Section, store: Store) -> Table:
    """The table of a section, with the paper's numbers beside where it has any for this model.

    Args:
        section: what is compared.
        store: where the answers are that tell whether a difference is more than chance.
    """
    published = paper.numbers(section.model)
    scores = _score_columns(section)
    printed = _paper_columns(section, published)
    columns = (
        Column("strategy"),
        Column("ratio"),
        Column("removed"),
        *scores.values(),
        *(Column(name.replace("_", " "), "%", MEASURED) for name in section.metrics_beside),
        Column("retained", "%", MEASURED, is_score=True),
        Column("params", "", MEASURED),
        Column("speed", "", MEASURED),
        *(Column(f"training {name}", "", MEASURED) for name in _spent(section)),
        *printed.values(),
    )

    def paper_cells(row: Row | None) -> list[Cell]:
        if published is None:
            return []
        values = [published.value(row, task, section.tasks) for task in printed]
        return [
            _score_cell(Estimate(value), _places(section, task)) for task, value in zip(printed, values, strict=True)
        ]

    lines = [Line(None, (*_dense_cells(section), *paper_cells(None)))]
    lines += [Line(row, (*_row_cells(section, row), *paper_cells(row))) for row in section.rows]
    notes = table_notes(section)
    if published and printed:
        notes.append(f"Paper: numbers for {published.model} printed in {paper.SOURCE}; not measured here.")
    return Table(section.title, columns, tuple(_with_best(columns, lines, store)), tuple(notes))


def _spent(section: Section) -> tuple[str, ...]:
    """The parts of a training's budget, where any run was trained."""
    return ("steps", "samples", "tokens", "seconds") if section.recovers else ()


def _score_columns(section: Section) -> dict[str | None, Column]:
    """A column of each benchmark's main metric, and of the average (None)."""
    columns = {}
    for task in (*section.tasks, None):
        name = _short_name(section, task)
        unit = "%" if section.scale(task) == 100 else ""
        if task:
            metric = section.last.result["scores"][task]["metric"]
            name = f"{name} {SHORT_METRICS.get(metric, metric.replace('_', ' '))}"
        columns[task] = Column(name, unit, MEASURED, section.lower_is_better(task), is_score=True, task=task)
    return columns


def _short_name(section: Section, task: str | None) -> str:
    """A benchmark's name without what all of them begin with."""
    if task is None:
        return "average"
    shared = ""
    if len(section.tasks) > 1:
        shared = re.sub(r"[^_]*$", "", os.path.commonprefix(section.tasks))  # noqa: RUF071 (of names, not of paths)
    return task.removeprefix(shared)


def _paper_columns(section: Section, published: paper.Published | None) -> dict[str | None, Column]:
    """Columns of the benchmarks that the paper has numbers for."""
    if published is None:
        return {}
    return {
        task: Column(_short_name(section, task), column.unit, PAPER)
        for task, column in _score_columns(section).items()
        if published.value(None, task, section.tasks) is not None
    }


def _places(section: Section, task: str | None) -> int:
    """Decimals of a benchmark's numbers; losses are small."""
    return 3 if section.lower_is_better(task) else 1


def _dense_cells(section: Section) -> list[Cell]:
    """The line of the unpruned model."""
    cost = section.last.result["cost"]
    scores = [
        _score_cell(Estimate(section.dense(task)).times(section.scale(task)), _places(section, task))
        for task in (*section.tasks, None)
    ]
    return [
        Cell("dense", "dense"),
        Cell("0 %", 0.0),
        Cell(f"0 / {cost['layers_dense']}", 0),
        *scores,
        *(_score_cell(Estimate(section.dense_beside(name)).times(100)) for name in section.metrics_beside),
        UNKNOWN if section.lower_is_better(None) else Cell("100.0", 100.0),
        _count_cell(cost.get("params_dense")),
        Cell("×1.00", 1.0),
        *(Cell("0", 0.0) for _ in _spent(section)),
    ]


def _row_cells(section: Section, row: Row) -> list[Cell]:
    """The line of a row, without the paper's columns."""
    cost, n_remove = row.first.result["cost"], row.first.result["n_remove"]
    label = row.label if len(row.runs) == 1 else f"{row.label} ({len(row.runs)} seeds)"
    speed = section.speed(row)
    scores = [
        _score_cell(row.score(task).times(section.scale(task)), _places(section, task), with_error=task is None)
        for task in (*section.tasks, None)
    ]
    return [
        Cell(label, label),
        Cell(f"{100 * row.ratio:g} %", 100 * row.ratio),
        Cell(f"{n_remove} / {cost['layers_dense']}", n_remove),
        *scores,
        *(_score_cell(row.beside(name).times(100)) for name in section.metrics_beside),
        _score_cell(row.retained.times(100)),
        _count_cell(cost.get("params")),
        UNKNOWN if speed is None else Cell(f"×{speed:.2f}", speed),
        *(_spent_cell(row.spent(name)) for name in _spent(section)),
    ]


def _score_cell(estimate: Estimate, places: int = 1, with_error: bool = False) -> Cell:
    """A number of a result; its error is in the text only if asked for."""
    if estimate.value is None:
        return UNKNOWN
    text = f"{estimate.value:.{places}f}"
    if with_error and estimate.error is not None:
        text += f" ± {estimate.error:.{places}f}"
    return Cell(text, estimate.value, estimate.error)


def _spent_cell(estimate: Estimate) -> Cell:
    """A part of a budget: of several seeds, the mean."""
    return UNKNOWN if estimate.value is None else Cell(f"{estimate.value:,.0f}", estimate.value, estimate.error)


def _count_cell(n: int | None) -> Cell:
    """1234567 -> "1.23 M"."""
    if n is None:
        return UNKNOWN
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if n >= s), (1, ""))
    return Cell(f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}", n)


def _with_best(columns: Sequence[Column], lines: Sequence[Line], store: Store) -> Iterator[Line]:
    """The lines with the best values of every scored column at every ratio marked, if there are rivals.

    Besides the best value, all are marked that are not significantly different from it.
    """
    marked: set[tuple[int, int]] = set()  # line and column
    ratios = [line.row.ratio if line.row else None for line in lines]
    for ratio in set(ratios) - {None}:
        rivals = [i for i in range(len(lines)) if ratios[i] == ratio]
        for j, column in enumerate(columns):
            if column.is_score:
                marked |= {(i, j) for i in _best_lines(lines, rivals, j, column, store)}
    for i, line in enumerate(lines):
        cells = [cell._replace(best=(i, j) in marked) for j, cell in enumerate(line.cells)]
        yield Line(line.row, tuple(cells))


def _best_lines(lines: Sequence[Line], rivals: Sequence[int], j: int, column: Column, store: Store) -> Iterator[int]:
    """Which of the lines `rivals` are best in column j; none if there is no other one with a number."""
    values = {i: value for i in rivals if isinstance(value := lines[i].cells[j].value, int | float)}
    if len(values) < 2:
        return
    choose = min if column.lower_is_better else max
    best = choose(values, key=lambda i: values[i])
    for i, value in values.items():
        if value == values[best] or _is_as_good(store, lines[best].row, lines[i].row, column):
            yield i


def _is_as_good(store: Store, best: Row | None, row: Row | None, column: Column) -> bool:
    """Whether a row's difference to the best one is not significant; not for the dense model, which is no rival."""
    if best is None or row is None:
        return False
    return is_significantly_different(store, best, row, column.task) is False
