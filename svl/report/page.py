"""The report as one HTML file that needs nothing else: styles, script, figures and images are in it.

Here the data of the page is put together; `page.html.jinja` lays it out with `page.css`, and `page.js` sorts, filters,
opens and compares rows. What a reader has chosen is in the address behind #, so that it can be passed on. A policy in
the file's head forbids all requests.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from svl.core import Plan
from svl.evaluation import score_statistics
from svl.report.page_answers import MOST, add_image, compared_answers, row_id, shown_text, thumbnails
from svl.report.pictures import Picture
from svl.report.results import Run, stored_scores
from svl.report.rows import Row, Section
from svl.report.table_writers import as_csv, as_latex
from svl.report.tables import PAPER, Table, error_text
from svl.store.artifacts import Entry, Store
from svl.text.escaping import for_html, for_terminal

Pairs = Mapping[str, tuple[Entry, Entry]]  # by task, the scores of the pruned and the dense model


@dataclass(frozen=True)
class Live:
    """A page that is written again while runs finish.

    Attributes:
        seconds: after how many of them a browser reads it again.
        news: what is new, in a line.
    """

    seconds: int
    news: str


def render_page(
    name: str,
    sections: Sequence[Section],
    tables: Sequence[Table],
    drawn: Sequence[Sequence[Picture]],
    store: Store,
    live: Live | None = None,
) -> str:
    """The page of an experiment.

    Args:
        name: of the experiment.
        sections: what is compared.
        tables: the table of each section.
        drawn: the figures of each section.
        store: where the runs' scores are; scores that are gone are said to be.
        live: if it will be written again.
    """
    images: dict[str, str] = {}
    runs = [run for section in sections for run in section.runs]
    shown = [
        _section_data(section, table, pictures, store, images)
        for section, table, pictures in zip(sections, tables, drawn, strict=True)
    ]
    settings = {row_id(row): _settings(section, row) for section in sections for row in section.rows}
    filters = _filters(list(settings.values()))
    data = {
        "rows": {
            row_id(row): {
                "name": for_terminal(f"{row.label} {100 * row.ratio:g} %"),
                "settings": settings[row_id(row)],
                "seeds": len(row.runs),
                "removed": row.first.plan.removal_names,
                "fates": [_fate(row.first.plan, i) for i in range(row.first.plan.n_layers)],
            }
            for section in sections
            for row in section.rows
        },
        "sections": [compared_answers(section, store, images) for section in sections],
    }
    return _template().render(
        title=name,
        n_runs=len(runs),
        sections=shown,
        filters=filters,
        has_more_filters=any("." in name for name, _ in filters),
        versions=sorted({run.versions for run in runs}),
        images=images,
        data=data,
        live=live,
    )


def _settings(section: Section, row: Row) -> dict[str, str]:
    """Whatever can tell rows apart, as text: model, method, ratio, all settings that were used."""
    result = row.first.result
    names = ("strategy", "selector", "compensation", "recovery")
    methods = {name: str(result.get(name) or "none") for name in names}
    known = {"model": section.model, **methods, "ratio": f"{100 * row.ratio:g} %", **dict(row.first.settings())}
    if section.limit is not None:
        known["limit"] = f"{section.limit:g}"
    return {for_terminal(name): for_terminal(value) for name, value in known.items()}


def _filters(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Settings in which rows differ (a setting that a row has not is one), with their values."""
    found = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = list(dict.fromkeys(row[name] for row in rows if name in row))
        if name != "strategy" and (len(values) > 1 or any(name not in row for row in rows)):
            found.append((name, values))
    return found


def _template() -> Any:
    """The page's template. Whatever is put into it becomes text: no control characters, no markup."""
    environment = Environment(
        loader=PackageLoader("svl.report", ""),
        autoescape=True,
        finalize=_safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _safe(value: Any) -> Markup:
    """What the template's own macros and filters made, or text."""
    return value if isinstance(value, Markup) else Markup(for_html(value))


def _section_data(
    section: Section, table: Table, pictures: Sequence[Picture], store: Store, images: dict[str, str]
) -> dict[str, Any]:
    """A table and its figures. Adds the images of flipped questions to `images`."""
    groups = []
    if any(column.group == PAPER for column in table.columns):
        for name, columns in groupby(column.group for column in table.columns):
            groups.append({"name": name, "width": len(list(columns))})
    labels = sorted((row.label, row.strategy) for row in section.rows)
    return {
        "title": section.title,
        "strategies": list(dict.fromkeys(strategy for _, strategy in labels)),
        "downloads": {"csv": as_csv(table), "tex": as_latex([table])},
        "groups": groups,
        "columns": table.columns,
        "lines": [
            {"cells": line.cells, "details": _details(section, line.row, store, images) if line.row else None}
            for line in table.lines
        ],
        "notes": table.notes,
        "figures": [
            {
                "png": base64.b64encode(picture.path.read_bytes()).decode(),
                "caption": picture.caption,
                "file": picture.path.name,
            }
            for picture in pictures
        ],
    }


def _details(section: Section, row: Row, store: Store, images: dict[str, str]) -> dict[str, Any]:
    """What a row opens: plans, numbers, settings, and questions that flipped against the dense model."""
    run = row.first
    methods = [(name, run.result.get(name) or "none") for name in ("selector", "compensation", "recovery")]
    return {
        "id": row_id(row),
        "name": f"{row.label} {100 * row.ratio:g} %",
        "strategy": row.strategy,
        "seeds": [other.result["seed"] for other in row.runs],
        "same": row.seeds > len(row.runs),
        "plans": [
            {
                "seed": other.result["seed"],
                "layers": _layers(other.plan),
                "has_importance": bool(other.plan.importance),
                "removed": ", ".join(other.plan.removal_names) or "none",
            }
            for other in row.runs
        ],
        "numbers": [_numbers(section, row, task) for task in (*section.tasks, None)],
        "settings": [*methods, *run.settings()],
        "training": [(name, str(value)) for name, value in (run.result.get("training") or {}).items()],
        "flips": list(_flips(_pairs(run, store), images)),
    }


def _fate(plan: Plan, i: int) -> tuple[str, str]:
    """What becomes of a layer, as a class of page.css and in words."""
    if i in plan.removed:
        return "gone", "removed"
    lost = next((role for layer, role in plan.sublayers if layer == i), None)
    return ("part", f"without its {lost}") if lost else ("kept", "kept")


def _layers(plan: Plan) -> list[dict[str, Any]]:
    """The layers in a row, with the height of a bar for their importance in percent of the largest."""
    values = plan.importance or (0.0,) * plan.n_layers
    low, high = min(0.0, *values), max(values)
    step = max(1, math.ceil(plan.n_layers / 16))
    layers = []
    for i, value in enumerate(values):
        height = 100 * (value - low) / (high - low) if high > low else 0.0
        fate, word = _fate(plan, i)
        title = f"layer {i}: {word}" + (f", importance {value:.4g}" if plan.importance else "")
        layers.append({"fate": fate, "height": f"{height:.1f}", "title": title, "numbered": i % step == 0})
    return layers


def _numbers(section: Section, row: Row, task: str | None) -> list[str]:
    """A benchmark (None: the average): value, its errors and 95 % interval, the dense value, what the answers say.

    Of several seeds, value and errors are those of the mean, and what the answers say is that of each.
    """
    scale, places = section.scale(task), 3 if section.lower_is_better(task) else 1
    estimate = row.score(task).times(scale)
    interval = estimate.interval(section.limits(task))
    dense = row.first.main_metric(task).get("dense")
    changes = [(run.result["scores"][task].get("change") if task else None) or {} for run in row.runs]
    units = [f"{c['units_gained']} / {c.get('units_lost')}" for c in changes if c.get("units_gained") is not None]
    errors = (estimate.questions, estimate.draws)
    return [
        task or "average",
        "–" if estimate.value is None else f"{estimate.value:.{places}f}",
        *("–" if error is None else error_text(error, places) if error else "0" for error in errors),
        "–" if interval is None else f"{interval[0]:.{places}f} to {interval[1]:.{places}f}",
        "–" if dense is None else f"{scale * dense:.{places}f}",
        "; ".join(f"{c['p']:.2g}" for c in changes if isinstance(c.get("p"), float)) or "–",
        "; ".join(units) or "–",
    ]


# ---------------------------------------------------------------------------------------------- answers


def _pairs(run: Run, store: Store) -> Pairs:
    """The stored scores of the run and of the dense model."""
    pruned, dense = stored_scores(store, run), stored_scores(store, run, "dense")
    return {task: (entry, dense[task]) for task, entry in pruned.items() if task in dense}


def _flips(pairs: Pairs, images: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Benchmark by benchmark, the questions that only one of the pruned and the dense model answered right."""
    for task, (pruned, dense) in pairs.items():
        gained, lost = score_statistics.flipped(pruned, dense)
        stored = thumbnails(pruned) | thumbnails(dense)
        ways = []
        for name, right, flips in (("lost", "dense", lost), ("gained", "pruned", gained)):
            cards = []
            for ours, theirs in flips[:MOST]:
                cards.append(_card(ours, theirs, add_image(dense, ours["doc_id"], stored, images)))
            if cards:
                ways.append({"name": name, "right": right, "cards": cards, "more": max(0, len(flips) - MOST)})
        yield {"name": task, "n_lost": len(lost), "n_gained": len(gained), "ways": ways}


def _card(pruned: Mapping[str, Any], dense: Mapping[str, Any], image: str | None) -> dict[str, Any]:
    """A question, its answer and those of both models."""
    return {
        "image": image,
        "number": pruned["doc_id"],
        "question": shown_text(pruned["question"]),
        "expected": shown_text(pruned["target"]),
        "dense": shown_text(dense["prediction"]),
        "pruned": shown_text(pruned["prediction"]),
    }
