"""The table of a section: cells first, apart from how they are written (svl.report.table_writers).

A cell has its text, the number behind it, its error, and whether it is the best at its ratio. Measured columns and
the paper's are groups of their own, which every way of writing keeps apart and names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from svl.report import paper
from svl.report.notes import table_caption, table_notes
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
    """Columns, lines (the dense model first), notes for who made it, and sentences for a paper's caption."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    caption: tuple[str, ...]

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
    printed = [] if published is None else list(_paper_columns(section, published))
    filled = [*_plan_columns(section), *_score_columns(section), *_cost_columns(section), *printed]
    columns = [part.column for part in filled]
    lines = [Line(None, tuple(part.dense for part in filled))]
    lines += [Line(row, tuple(part.fill(row) for part in filled)) for row in section.rows]
    notes, caption = table_notes(section), table_caption(section)
    if published and printed:
        source = f"Paper: numbers for {published.model} printed in {paper.SOURCE}; not measured here."
        notes, caption = [*notes, source], [*caption, source]
    return Table(section.title, tuple(columns), tuple(_with_best(columns, lines, store)), tuple(notes), tuple(caption))


class Filled(NamedTuple):
    """A column, its cell of the dense model, and what makes that of a row."""

    column: Column
    dense: Cell
    fill: Callable[[Row], Cell]


def _plan_columns(section: Section) -> Iterator[Filled]:
    """What a row is about."""
    layers = section.last.result["cost"]["layers_dense"]

    def removed(row: Row) -> Cell:
        plan = row.first.plan
        n, parts = len(plan.removed), len(plan.sublayers)
        also = f" + {parts} sub-layer{'s' * (parts > 1)}" if parts else ""
        return Cell(f"{n} / {row.first.result['cost']['layers_dense']}{also}", n + parts / 2)

    yield Filled(Column("strategy"), Cell("dense", "dense"), lambda row: Cell(row.label, row.label))
    if any(len(row.runs) > 1 for row in section.rows):
        yield Filled(Column("seeds"), UNKNOWN, lambda row: Cell(str(len(row.runs)), len(row.runs)))
    yield Filled(Column("ratio"), Cell("0 %", 0.0), lambda row: Cell(f"{100 * row.ratio:g} %", 100 * row.ratio))
    yield Filled(Column("removed"), Cell(f"0 / {layers}", 0), removed)


def _score_columns(section: Section) -> Iterator[Filled]:
    """Main metrics and their average, the averages beside, and what is retained."""
    for task in (*section.tasks, None):
        scale, places = section.scale(task), _places(section, task)

        def fill(row: Row, task: str | None = task, scale: int = scale, places: int = places) -> Cell:
            return _score_cell(row.score(task).times(scale), places, with_error=task is None)

        dense = _score_cell(Estimate(section.dense(task)).times(scale), places)
        yield Filled(_score_column(section, task), dense, fill)
    for name in section.metrics_beside:

        def beside(row: Row, name: str = name) -> Cell:
            return _score_cell(row.beside(name).times(100))

        dense = _score_cell(Estimate(section.dense_beside(name)).times(100))
        yield Filled(Column(name.replace("_", " "), "%", MEASURED), dense, beside)
    whole = UNKNOWN if section.lower_is_better(None) else Cell("100.0", 100.0)
    retained = Column("retained", "%", MEASURED, is_score=True)
    yield Filled(retained, whole, lambda row: _score_cell(row.retained.times(100)))


def _score_column(section: Section, task: str | None) -> Column:
    """That of a benchmark's main metric, which its name says, or of the average (None)."""
    name = "average"
    if task:
        metric = section.last.result["scores"][task]["metric"]
        name = f"{section.short_name(task)} {SHORT_METRICS.get(metric, metric.replace('_', ' '))}"
    unit = "%" if section.scale(task) == 100 else ""
    return Column(name, unit, MEASURED, section.lower_is_better(task), is_score=True, task=task)


def _cost_columns(section: Section) -> Iterator[Filled]:
    """What recovery took, where there was any; size and speed."""
    if section.recovers:
        for name in ("steps", "samples", "tokens", "seconds"):
            show = _time_cell if name == "seconds" else _count_cell

            def spent(row: Row, name: str = name, show: Callable[[float | None], Cell] = show) -> Cell:
                return show(row.spent(name).value)

            head = f"training {'time' if name == 'seconds' else name}"
            yield Filled(Column(head, "", MEASURED), show(0), spent)

    def speed(row: Row) -> Cell:
        value = section.speed(row)
        return UNKNOWN if value is None else Cell(f"×{value:.2f}", value)

    size = _count_cell(section.last.result["cost"].get("params_dense"))
    yield Filled(Column("params", "", MEASURED), size, lambda row: _count_cell(row.first.result["cost"].get("params")))
    yield Filled(Column("speed", "", MEASURED), Cell("×1.00", 1.0), speed)


def _paper_columns(section: Section, published: paper.Published) -> Iterator[Filled]:
    """The benchmarks that the paper has numbers for."""
    for task in (*section.tasks, None):
        if published.value(None, task, section.tasks) is None:
            continue
        places = _places(section, task)

        def fill(row: Row | None, task: str | None = task, places: int = places) -> Cell:
            return _score_cell(Estimate(published.value(row, task, section.tasks)), places)

        name = section.short_name(task) if task else "average"
        yield Filled(Column(name, _score_column(section, task).unit, PAPER), fill(None), fill)


def _places(section: Section, task: str | None) -> int:
    """Decimals of a benchmark's numbers; losses are small."""
    return 3 if section.lower_is_better(task) else 1


def _score_cell(estimate: Estimate, places: int = 1, with_error: bool = False) -> Cell:
    """A number of a result; its error is in the text only if asked for."""
    if estimate.value is None:
        return UNKNOWN
    text = f"{estimate.value:.{places}f}"
    if with_error and estimate.error is not None:
        text += f" ± {error_text(estimate.error, places)}"
    return Cell(text, estimate.value, estimate.error)


def error_text(error: float, places: int) -> str:
    """An error with `places` decimals, or with as many as it takes to show a digit other than 0."""
    shown = f"{error:.{places}f}"
    return shown if float(shown) else f"{error:.1g}"


def _time_cell(seconds: float | None) -> Cell:
    """90 -> "1.5 min"."""
    if seconds is None:
        return UNKNOWN
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= s), (1, "s"))
    return Cell(f"{seconds / size:.3g} {unit}", seconds)


def _count_cell(n: float | None) -> Cell:
    """1234567 -> "1.23 M"."""
    if n is None:
        return UNKNOWN
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if n >= s), (1, ""))
    return Cell(f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}", n)


def _with_best(columns: Sequence[Column], lines: Sequence[Line], store: Store) -> Iterator[Line]:
    """The lines with the best values of every scored column at every ratio marked, if there are rivals.

    The best value is marked alone only where it is significantly better than the next: all that it is not better than
    are marked with it.
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
    """Whether the best row is not shown to be better than another one; unknown errors show nothing."""
    return best is not None and row is not None and not is_significantly_different(store, best, row, column.task)
