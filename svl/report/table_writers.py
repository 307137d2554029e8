"""How tables are written: Markdown, LaTeX, CSV, for a terminal. Text from outside is made safe for each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text
from tabulate import tabulate

from svl.core import SvlError
from svl.report.rows import Estimate, Section
from svl.report.tables import PAPER, Cell, Column, Table, error_text
from svl.text.escaping import for_csv, for_latex, for_markdown, for_terminal


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]], align: str) -> str:
    """A table in Markdown; `align` has "l" or "r" for each column. The cells must be safe Markdown."""
    sides = [{"l": "left", "r": "right"}[letter] for letter in align]
    return tabulate([list(line) for line in lines], list(head), "pipe", colalign=sides, disable_numparse=True)


def markdown_list(lines: Iterable[str]) -> str:
    """Lines of plain text as a list in Markdown."""
    return "\n".join(f"- {for_markdown(line)}" for line in lines)


def as_markdown(table: Table) -> str:
    """The table and its notes as Markdown."""
    head = [for_markdown(column.head) for column in table.columns]
    lines = []
    for line in table.lines:
        texts = [for_markdown(cell.text) for cell in line.cells]
        lines.append([f"**{t}**" if cell.best else t for t, cell in zip(texts, line.cells, strict=True)])
    align = "l" + "r" * (len(head) - 1)
    return f"{markdown_table(head, lines, align)}\n\n{markdown_list(table.notes)}"


def as_rich(table: Table) -> RichTable:
    """The table for a terminal."""
    title = Text(for_terminal(table.title), "bold")
    shown = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for j, column in enumerate(table.columns):
        shown.add_column(Text(for_terminal(column.head)), justify="right" if j else "left", no_wrap=True)
    for block in table.blocks():
        for cells in block:
            texts = [Text(for_terminal(cell.text), "bold" if cell.best else "") for cell in cells]
            shown.add_row(*texts, end_section=cells is block[-1])
    return shown


def as_csv(table: Table) -> str:
    """A table as CSV: a line per row with values and errors in the unit of the head, paper columns marked."""
    heads = []
    for column in table.columns:
        group = f"{column.group}: " if column.group else ""
        heads.append(f"{group}{column.name} {column.unit}".strip())
        if column.is_score:
            heads.append(f"{group}{column.name} error")
    lines = []
    for line in table.lines:
        cells: list[Any] = []
        for column, cell in zip(table.columns, line.cells, strict=True):
            cells.append(_six_digits(cell.value))
            if column.is_score:
                cells.append(_six_digits(cell.error))
        lines.append(cells)
    return csv_text([heads, *lines])


def _six_digits(value: float | str | None) -> float | str | None:
    return f"{value:.6g}" if isinstance(value, float) else value


def csv_text(lines: Iterable[Iterable[Any]]) -> str:
    """Lines of cells as CSV (None: an empty cell); text never becomes a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows(["" if value is None else for_csv(value) for value in line] for line in lines)
    return out.getvalue()


def as_paper_csv(sections: Iterable[Section]) -> str:
    """Main metrics and averages in the layout and the units of experiments/paper (CSV), the dense model first.

    Raises:
        SvlError: if a sample limit was used: such numbers are no results.
    """
    lines: list[list[Any]] = [["model", "method", "pruning_ratio", "benchmark", "score", "samples_per_second"]]
    for section in sections:
        if section.limit is not None:
            raise SvlError(f"'{section.title}' is no table for a paper: run it without benchmark.limit")
        tasks = [*section.tasks, None]
        dense = {task: Estimate(section.dense(task)) for task in tasks}
        rows = [("dense", 0.0, dense, section.last.result["cost"].get("samples_per_second_dense"))]
        for row in section.rows:
            scores = {task: row.score(task) for task in tasks}
            rows.append((row.label, row.ratio, scores, row.first.result["cost"].get("samples_per_second")))
        for label, ratio, scores, speed in rows:
            for task, estimate in scores.items():
                name = "average" if task is None else task.removeprefix("svl_")
                value = None if estimate.value is None else f"{section.scale(task) * estimate.value:.1f}"
                rate = f"{speed:.2f}" if speed and task is None else None
                lines.append([section.model, label, ratio, name, value, rate])
    return csv_text(lines)


# ---------------------------------------------------------------------------------------------- LaTeX


def as_latex(tables: Sequence[Table]) -> str:
    """Tables for a paper: booktabs, errors in small print, measured and paper columns under heads of their own."""
    made = ["% Made by svl-report from finished runs. Needs \\usepackage{booktabs,graphicx}."]
    for number, table in enumerate(tables, 1):
        heads = [for_latex(f"{column.name} {column.unit}".strip()) for column in table.columns]
        blocks = [
            [_latex_line(_latex_cell(*c) for c in zip(table.columns, cells, strict=True)) for cells in block]
            for block in table.blocks()
        ]
        body = "\n\\midrule\n".join("\n".join(lines) for lines in [[_latex_line(heads)], *blocks])
        caption = for_latex(" ".join(table.caption))
        made.append("\n".join(f"% {for_latex(' '.join(note.split()))}" for note in (table.title, *table.notes)))
        made.append(
            "\\begin{table}[t]\n\\centering\n"
            f"\\caption{{{caption}}}\n\\label{{tab:svl-{number}}}\n\\smallskip\n"
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
            f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}\n\\toprule\n"
            f"{_latex_groups(table)}{body}\n\\bottomrule\n\\end{{tabular}}}}\n\\end{{table}}"
        )
    return "\n\n".join(made) + "\n"


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"


def _latex_groups(table: Table) -> str:
    """A line above the heads that names the groups of columns, where there are the paper's."""
    if all(column.group != PAPER for column in table.columns):
        return ""
    names, rules, first = [], [], 1
    for name, columns in groupby(column.group for column in table.columns):
        width = len(list(columns))
        names.append(f"\\multicolumn{{{width}}}{{c}}{{{name}}}")
        if name:
            rules.append(f"\\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    return f"{_latex_line(names)}\n{''.join(rules)}\n"


def _latex_cell(column: Column, cell: Cell) -> str:
    """The value, bold where best, and its error in small print."""
    text = for_latex(cell.text)
    places = 0
    if column.is_score:
        shown = cell.text.partition(" ± ")[0]
        text, places = for_latex(shown), len(shown.partition(".")[2])
    if cell.best:
        text = f"\\textbf{{{text}}}"
    if not column.is_score or cell.error is None:
        return text
    return f"{text}\\,{{\\scriptsize$\\pm$\\,{error_text(cell.error, places)}}}"
