"""The report as one HTML file that needs nothing else: styles, script, figures and images are in it.

The table, the plans and the flipped questions are plain HTML, written here; the script in `page.html` only sorts,
filters, opens a row, and shows an image when its row is opened. A policy in the file's head forbids all requests.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from svl import results
from svl.core import Plan
from svl.report.pictures import Picture
from svl.report.rows import Row, Run, Section, main_metric, settings_of, versions_of
from svl.report.tables import PAPER, Cell, Column, Table
from svl.store import Entry, Store

TEMPLATE = Path(__file__).parent / "page.html"
MOST = 8  # flipped questions that are shown of a plan, a benchmark and a direction
TEXT = 400  # characters of a question or an answer that are shown


def render(
    name: str, sections: Sequence[Section], tables: Sequence[Table], drawn: Sequence[Sequence[Picture]],
    entries: Sequence[Entry], store: Store,
) -> str:  # fmt: skip
    """The page of an experiment.

    Args:
        name: of the experiment.
        sections: what is compared.
        tables: the table of each section.
        drawn: the figures of each section.
        entries: all runs.
        store: where the runs' scores are; scores that are gone are said to be.
    """
    images: dict[str, str] = {}

    @cache
    def read(key: str) -> Entry | None:
        return store.read(store.root / "score" / key)

    def scores(run: Run, which: str) -> dict[str, Entry]:
        found = [read(key) for key in run.get("keys", {}).get(which, [])]
        return {entry.output["task"]: entry for entry in found if entry}

    body = []
    for number, (section, table, pictures) in enumerate(zip(sections, tables, drawn, strict=True)):
        details: list[str | None] = []
        for row in table.rows:
            if row is None:
                details.append(None)
                continue
            run = row.runs[0]
            pairs = {t: (e, d) for t, e in scores(run, "evaluate").items() if (d := scores(run, "dense").get(t))}
            details.append(_detail(section, row, pairs, images))
        body.append(
            f'<section><h2>{_text(section.title)}</h2>{_tools(section)}<div class="scroll">'
            f"{_table(table, details, number)}</div>{_list(table.notes)}</section>"
            f'<section class="figures">{"".join(map(_figure, pictures))}</section>'
        )
    versions = _list(sorted({versions_of(entry.output) for entry in entries}))
    body.append(f"<section><h2>Versions</h2>{versions}</section>")
    parts = {
        "title": _text(name),
        "summary": f"{len(entries)} run{'s' * (len(entries) != 1)}",
        "body": "\n".join(body),
        "images": json.dumps(images).replace("<", "\\u003c"),
    }
    # at once, because what is put in may look like a place to put something
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _short(value: Any) -> str:
    text = str(value).strip()
    return _text(text if len(text) <= TEXT else text[:TEXT] + " …")


def _list(lines: Sequence[str]) -> str:
    return '<ul class="notes">' + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = _text(picture.caption)
    return (
        f'<figure><div class="scroll"><img src="data:image/png;base64,{data}" alt="{caption}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _tools(section: Section) -> str:
    """The buttons that filter by strategy, and the count of rows."""
    names = dict.fromkeys(row.runs[0]["strategy"] for row in sorted(section.rows, key=lambda row: row.label))
    chips = [f'<button class="chip" data-strategy="{_text(n)}" aria-pressed="false">{_text(n)}</button>' for n in names]
    every = '<button class="chip" data-strategy="" aria-pressed="true">all</button>'
    return f'<div class="tools" role="group" aria-label="strategies">{every}{"".join(chips)}<span></span></div>'


def _table(table: Table, details: Sequence[str | None], number: int) -> str:
    """The table, a hidden line below each that the page opens."""
    heads = ""
    if any(column.group == PAPER for column in table.columns):
        spans = [(group, len(list(part))) for group, part in groupby(column.group for column in table.columns)]
        heads = "".join(f'<th colspan="{n}" class="group {group}">{_text(group)}</th>' for group, n in spans)
        heads = f"<tr>{heads}</tr>"
    heads += "<tr>" + "".join(map(_head, table.columns)) + "</tr>"
    lines = []
    for i, (line, row, detail) in enumerate(zip(table.lines, table.rows, details, strict=True)):
        cells = "".join(_cell(column, cell) for column, cell in zip(table.columns, line, strict=True))
        if row is None:
            lines.append(f'<tr class="dense">{cells}</tr>')
            continue
        place = f"row-{number}-{i}"
        strategy = _text(row.runs[0]["strategy"])
        lines.append(
            f'<tr class="row" data-strategy="{strategy}" tabindex="0" role="button" aria-expanded="false" '
            f'aria-controls="{place}">{cells}</tr><tr class="detail" id="{place}" hidden>'
            f'<td colspan="{len(line)}"><div>{detail}</div></td></tr>'
        )
    return f"<table><thead>{heads}</thead><tbody>{''.join(lines)}</tbody></table>"


def _head(column: Column) -> str:
    title = f"{column.group or 'plan'}: {column.name}"
    label = _text(f"{column.name} {column.unit}".strip())
    return f'<th class="{column.group}" title="{_text(title)}"><button>{label}</button></th>'


def _cell(column: Column, cell: Cell) -> str:
    value = "" if cell.value is None else _text(cell.value)
    text = f"<b>{_text(cell.text)}</b>" if cell.best else _text(cell.text)
    return f'<td class="{column.group}" data-value="{value}">{text}</td>'


# --------------------------------------------------------------------------------------------- one row


def _detail(section: Section, row: Row, pairs: dict[str, tuple[Entry, Entry]], images: dict[str, str]) -> str:
    """What a row opens: plan, numbers, settings, and questions that flipped against the dense model."""
    run = row.runs[0]
    seeds = f"<p>Of {len(row.runs)} seeds, the first: {_text(run['seed'])}.</p>" if len(row.runs) > 1 else ""
    about = [("selector", run["selector"] or "none"), ("compensation", run["compensation"] or "none")]
    about += list(settings_of(run))
    settings = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in about)
    return (
        f"{seeds}<h3>Layers</h3>{_plan(row.plan)}<h3>Numbers</h3>{_numbers(section, run)}"
        f"<details><summary>Settings</summary><dl>{settings}</dl></details>"
        f"<h3>Answers that flipped</h3>{''.join(_flips(pairs, images)) or '<p>None are stored.</p>'}"
    )


def _plan(plan: Plan) -> str:
    """The layers in a row, those that go filled; bars are their importance."""
    values = plan.importance or (0.0,) * plan.n_layers
    low, high = min(0.0, *values), max(values)
    step = max(1, math.ceil(plan.n_layers / 16))
    kind = "plan" if plan.importance else "plan flat"
    cells = []
    for i, value in enumerate(values):
        gone = i in plan.removed
        height = 100 * (value - low) / (high - low) if high > low else 0
        title = f"layer {i}: {'removed' if gone else 'kept'}" + (f", importance {value:.4g}" if plan.importance else "")
        number = f"<small>{i}</small>" if i % step == 0 else ""
        cells.append(
            f'<li class="{"gone" if gone else "kept"}" title="{_text(title)}">'
            f'<i style="height:{height:.1f}%"></i><b></b>{number}</li>'
        )
    names = ", ".join(map(str, plan.removed)) or "none"
    columns = f'style="grid-template-columns:repeat({plan.n_layers},minmax(0,1fr))"'
    return f'<ol class="{kind}" {columns}>{"".join(cells)}</ol><p>Removed: {names} (of {plan.n_layers}, from 0).</p>'


def _numbers(section: Section, run: Run) -> str:
    """Main metrics with their 95 % intervals, the dense values beside, and what the answers say sample by sample."""
    head = "<tr><th>benchmark</th><th>value</th><th>95 % interval</th><th>dense</th><th>p (McNemar)</th></tr>"
    lines = []
    for task in (*section.tasks, None):
        body, scale = main_metric(run, task), section.scale(task)
        change = (run["scores"][task].get("change") if task else None) or {}
        places = 3 if section.lower(task) else 1
        value, error, dense = (body.get(key) for key in ("value", "stderr", "dense"))
        interval = "–"
        if value is not None and error is not None:
            low, high = (scale * (value + sign * 1.96 * error) for sign in (-1, 1))
            interval = f"{low:.{places}f} to {high:.{places}f}"
        shown = ["–" if x is None else f"{scale * x:.{places}f}" for x in (value, dense)]
        p = f"{change['p']:.2g}" if "p" in change else "–"
        cells = [task or "average", shown[0], interval, shown[1], p]
        lines.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table class="small">{head}{"".join(lines)}</table></div>'


def _flips(pairs: dict[str, tuple[Entry, Entry]], images: dict[str, str]) -> Iterator[str]:
    """Benchmark by benchmark, the questions that only one of the pruned and the dense model answered right."""
    for task, (pruned, dense) in pairs.items():
        gained, lost = results.flipped(pruned, dense)
        stored = _thumbnails(pruned) | _thumbnails(dense)
        yield f"<h4>{_text(task)}: {len(lost)} lost, {len(gained)} gained</h4>"
        for word, flips in (("lost", lost), ("gained", gained)):
            right = "dense" if word == "lost" else "pruned"
            cards = []
            for ours, theirs in flips[:MOST]:
                picture, number = "", str(ours["doc_id"])
                if number in stored:
                    name = f"{dense.key}/{number}"
                    images[name] = stored[number]
                    picture = f'<img data-image="{_text(name)}" alt="image of question {_text(number)}">'
                cards.append(
                    f'<li class="{word}">{picture}<p>{_short(ours["question"])}</p>'
                    f"<p><span>expected</span> {_short(ours['target'])}</p>"
                    f"<p><span>dense</span> {_short(theirs['prediction'])}</p>"
                    f"<p><span>pruned</span> {_short(ours['prediction'])}</p></li>"
                )
            if cards:
                more = f"<p>… and {len(flips) - MOST} more {word}.</p>" if len(flips) > MOST else ""
                way = f'<p class="way">{word.capitalize()}: only the {right} model is right.</p>'
                yield f'{way}<ul class="cards">{"".join(cards)}</ul>{more}'


def _thumbnails(entry: Entry) -> dict[str, str]:
    """Small images of the questions that a model answered wrong, by number."""
    file = entry.path / "thumbnails.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
