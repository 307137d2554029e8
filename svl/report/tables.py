"""One table of a section, and how it is written: Markdown, LaTeX, CSV, for a terminal.

A table is cells first: text, the number behind it, its error, whether it is the best at its ratio. Measured columns
and the paper's are groups of their own, which every way of writing keeps apart and names.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from svl.report import paper
from svl.report.rows import Estimate, Row, Run, Section

MEASURED, PAPER = "measured", "paper"


class Cell(NamedTuple):
    """What is written, the value and error behind it (in the unit of the column), and whether no rival is better."""

    text: str
    value: float | str | None = None
    error: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """Name, unit ("%" or none) and group: MEASURED, PAPER, or none for what a row is about."""

    name: str
    unit: str = ""
    group: str = ""
    lower: bool = False
    scored: bool = False  # so it has a best value

    @property
    def head(self) -> str:
        """Name and unit."""
        marked = f"{PAPER}: {self.name}" if self.group == PAPER else self.name
        return f"{marked} {self.unit}".strip()


@dataclass(frozen=True)
class Table:
    """Columns; lines of cells, the dense model first; the row of each line (None: the dense model)."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[tuple[Cell, ...], ...]
    rows: tuple[Row | None, ...]
    notes: tuple[str, ...]

    def blocks(self) -> Iterator[list[tuple[Cell, ...]]]:
        """The lines of one ratio after another's."""
        for _, block in groupby(zip(self.rows, self.lines, strict=True), lambda x: x[0] and x[0].ratio):
            yield [line for _, line in block]


def tabulate(section: Section) -> Table:
    """The table of a section, with the paper's numbers beside where it has any for this model."""
    run = section.runs[-1]
    shared = re.sub(r"[^_]*$", "", os.path.commonprefix(section.tasks)) if len(section.tasks) > 1 else ""  # noqa: RUF071
    tasks: list[str | None] = [*section.tasks, None]
    names = {task: task.removeprefix(shared) if task else "average" for task in tasks}
    scale = {task: section.scale(task) for task in tasks}
    places = {task: 3 if section.lower(task) else 1 for task in tasks}  # losses are small numbers
    unit = {task: "%" if size == 100 else "" for task, size in scale.items()}
    published = paper.numbers(section.model)

    columns = [Column("strategy"), Column("ratio"), Column("removed")]
    columns += [Column(names[t], unit[t], MEASURED, section.lower(t), scored=True) for t in tasks]
    columns += [Column("retained", "%", MEASURED, scored=True), Column("params"), Column("speed")]
    columns = [replace(c, group=c.group or MEASURED) if i > 2 else c for i, c in enumerate(columns)]
    beside = [t for t in tasks if published and published.value(None, t, section.tasks) is not None]
    columns += [Column(names[t], unit[t], PAPER) for t in beside]

    def numbers(row: Row | None) -> list[Cell]:
        found = [published.value(row, t, section.tasks) if published else None for t in beside]
        return [Cell(_number(Estimate(v), 1, places[t]), v) for t, v in zip(beside, found, strict=True)]

    cost = run["cost"]
    dense = [_score(Estimate(section.dense(t)), scale[t], places[t]) for t in tasks]
    kept = Cell("–") if section.lower(None) else Cell("100.0", 100.0)
    about = [Cell("dense", "dense"), Cell("0 %", 0.0), Cell(f"0 / {cost['layers_dense']}", 0)]
    lines = [[*about, *dense, kept, _count(cost.get("params_dense")), Cell("×1.00", 1.0), *numbers(None)]]
    for row in section.rows:
        first, seeds, speed = row.runs[0], len(row.runs), section.speed(row)
        label = row.label if seeds == 1 else f"{row.label} ({seeds} seeds)"
        removed = f"{first['n_remove']} / {first['cost']['layers_dense']}"
        line = [
            Cell(label, label),
            Cell(f"{100 * row.ratio:g} %", 100 * row.ratio),
            Cell(removed, first["n_remove"]),
            *(_score(row.score(t), scale[t], places[t], shown=t is None) for t in tasks),
            _score(row.retained, 100, shown=False),
            _count(first["cost"].get("params")),
            Cell("–") if speed is None else Cell(f"×{speed:.2f}", speed),
            *numbers(row),
        ]
        lines.append(line)
    rows = (None, *section.rows)
    notes = section.notes()
    if beside and published:
        notes.append(f"Paper: numbers for {published.model} printed in {paper.SOURCE}; not measured here.")
    return Table(section.title, tuple(columns), tuple(_mark(columns, lines, rows)), rows, tuple(notes))


def _mark(columns: list[Column], lines: list[list[Cell]], rows: Sequence[Row | None]) -> Iterator[tuple[Cell, ...]]:
    """The lines with the best value of every scored column at every ratio marked, if there are rivals."""
    for line, row in zip(lines, rows, strict=True):
        marked = []
        for j, (column, cell) in enumerate(zip(columns, line, strict=True)):
            rivals = [
                value for other, r in zip(lines, rows, strict=True)
                if row and r and r.ratio == row.ratio and isinstance(value := other[j].value, int | float)
            ]  # fmt: skip
            best = min if column.lower else max
            won = column.scored and len(rivals) > 1 and cell.value == best(rivals)
            marked.append(cell._replace(best=won))
        yield tuple(marked)


def _score(estimate: Estimate, scale: float, places: int = 1, shown: bool = True) -> Cell:
    """A number of a result; its error is in the text only if `shown`."""
    value, error = (None if x is None else scale * x for x in estimate)
    return Cell(_number(estimate if shown else Estimate(estimate.value), scale, places), value, error)


def _number(estimate: Estimate, scale: float, places: int) -> str:
    """Value and error with so many decimals, both times `scale`."""
    if estimate.value is None:
        return "–"
    error = "" if estimate.error is None else f" ± {scale * estimate.error:.{places}f}"
    return f"{scale * estimate.value:.{places}f}{error}"


def _count(n: int | None) -> Cell:
    """1234567 -> "1.23 M"."""
    if n is None:
        return Cell("–")
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if n >= s), (1, ""))
    return Cell(f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}", n)


# ---------------------------------------------------------------------------------------------- writing


def markdown(table: Table) -> str:
    """The table and its notes as Markdown."""
    lines = [[column.head for column in table.columns], ["---", *["---:"] * (len(table.columns) - 1)]]
    lines += [[f"**{cell.text}**" if cell.best else cell.text for cell in line] for line in table.lines]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *(f"- {note}" for note in table.notes)])


def terminal(table: Table) -> RichTable:
    """The table for a terminal."""
    shown = RichTable(title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for j, column in enumerate(table.columns):
        shown.add_column(Text(column.head), justify="right" if j else "left", no_wrap=True)
    for block in table.blocks():
        for line in block:
            shown.add_row(*(Text(c.text, "bold" if c.best else "") for c in line), end_section=line is block[-1])
    return shown


def comma_separated(table: Table) -> str:
    """A table as CSV: a line per row with values and errors in the unit of the head, paper columns marked."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = []
    for column in table.columns:
        group = f"{column.group}: " if column.group else ""
        heads += [f"{group}{column.name} {column.unit}".strip()]
        heads += [f"{group}{column.name} error"] if column.scored else []
    writer.writerow(heads)
    for line in table.lines:
        cells: list[str] = []
        for column, cell in zip(table.columns, line, strict=True):
            cells += [_plain(cell.value)] + ([_plain(cell.error)] if column.scored else [])
        writer.writerow(cells)
    return out.getvalue()


def _plain(value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def latex(tables: Sequence[Table]) -> str:
    """Tables for a paper: booktabs, errors in small print, measured and paper columns under heads of their own."""
    made = ["% Made by svl-report from finished runs. Needs \\usepackage{booktabs,graphicx}."]
    for number, table in enumerate(tables, 1):
        head = [[escape(f"{c.name} {c.unit}".strip()) for c in table.columns]]
        blocks = [
            [[_latex(c, cell) for c, cell in zip(table.columns, line, strict=True)] for line in block]
            for block in table.blocks()
        ]
        body = "\n\\midrule\n".join("\n".join(map(_line, block)) for block in [head, *blocks])
        caption = escape(f"{table.title}. {' '.join(table.notes)}")
        made.append(
            "\\begin{table}[t]\n\\centering\n"
            f"\\caption{{{caption}}}\n\\label{{tab:svl-{number}}}\n\\smallskip\n"
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
            f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}\n\\toprule\n"
            f"{_groups(table)}{body}\n\\bottomrule\n\\end{{tabular}}}}\n\\end{{table}}"
        )
    return "\n\n".join(made) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + " \\\\"


def _groups(table: Table) -> str:
    """A line above the heads that names the groups of columns, where there are the paper's."""
    if all(column.group != PAPER for column in table.columns):
        return ""
    names, rules, first = [], [], 1
    for name, columns in groupby(column.group for column in table.columns):
        width = len(list(columns))
        names.append(f"\\multicolumn{{{width}}}{{c}}{{{name}}}")
        rules += [f"\\cmidrule(lr){{{first}-{first + width - 1}}}"] if name else []
        first += width
    return f"{_line(names)}\n{''.join(rules)}\n"


def _latex(column: Column, cell: Cell) -> str:
    text = escape(cell.text.partition(" ± ")[0])
    text = f"\\textbf{{{text}}}" if cell.best else text
    if not column.scored or cell.error is None:
        return text
    error = f"{cell.error:.{len(cell.text.partition(' ')[0].partition('.')[2])}f}"
    return f"{text}\\,{{\\scriptsize$\\pm$\\,{error}}}"


LATEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "±": "$\\pm$", "×": "$\\times$", "–": "--", "−": "$-$", "…": "\\dots{}", '"': "''",
}  # fmt: skip


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


# ------------------------------------------------------------------------------------------- every number


def numbers(run: Run) -> Iterator[tuple[Any, ...]]:
    """Every number of a result: (group, task, metric, main, n, value, stderr, dense)."""
    for task, score in run["scores"].items():
        for metric, body in score["metrics"].items():
            main = int(metric == score["metric"])
            yield "eval", task, metric, main, score["n"], body["value"], body.get("stderr"), body.get("dense")
    for name in ("average", "retained"):
        body = run[name] or {}
        yield "eval", "", name, 0, "", body.get("value"), body.get("stderr"), body.get("dense")
    for group in ("cost", "seconds"):
        for name, value in run[group].items():
            if not name.endswith("_dense"):
                yield group, "", name, 0, "", value, None, run[group].get(f"{name}_dense")
