"""The report as one HTML file that needs nothing else: styles, script, figures and images are in it.

Here the data of the page is put together; `page.html.jinja` lays it out, and its script sorts, filters, opens a row,
and shows an image when its row is opened. A policy in the file's head forbids all requests.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from svl.core import Plan
from svl.evaluation import score_statistics
from svl.report.pictures import Picture
from svl.report.results import Run, stored_scores
from svl.report.rows import Estimate, Row, Section
from svl.report.tables import PAPER, Line, Table
from svl.store.artifacts import Entry, Store
from svl.text.escaping import for_html

MOST = 8  # flipped questions that are shown of a plan, a benchmark and a direction
LONGEST = 400  # characters of a question or an answer that are shown

Pairs = Mapping[str, tuple[Entry, Entry]]  # by task, the scores of the pruned and the dense model


def render_page(
    name: str, sections: Sequence[Section], tables: Sequence[Table], drawn: Sequence[Sequence[Picture]], store: Store
) -> str:
    """The page of an experiment.

    Args:
        name: of the experiment.
        sections: what is compared.
        tables: the table of each section.
        drawn: the figures of each section.
        store: where the runs' scores are; scores that are gone are said to be.
    """
    images: dict[str, str] = {}
    runs = [run for section in sections for run in section.runs]
    shown = [
        _section_data(section, table, pictures, store, images)
        for section, table, pictures in zip(sections, tables, drawn, strict=True)
    ]
    return _template().render(
        title=name, n_runs=len(runs), sections=shown, versions=sorted({run.versions for run in runs}), images=images
    )


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
        "groups": groups,
        "columns": table.columns,
        "lines": [
            {"cells": line.cells, "details": _details(section, line, line.row, store, images) if line.row else None}
            for line in table.lines
        ],
        "notes": table.notes,
        "figures": [
            {"png": base64.b64encode(picture.path.read_bytes()).decode(), "caption": picture.caption}
            for picture in pictures
        ],
    }


def _details(section: Section, line: Line, row: Row, store: Store, images: dict[str, str]) -> dict[str, Any]:
    """What a row opens: plan, numbers, settings, and questions that flipped against the dense model."""
    run = row.first
    result = run.result
    methods = [(name, result.get(name) or "none") for name in ("selector", "compensation", "recovery")]
    return {
        "strategy": row.strategy,
        "seeds": row.seeds,
        "seed": result["seed"],
        "layers": _layers(run.plan),
        "has_importance": bool(run.plan.importance),
        "removed": ", ".join(map(str, run.plan.removed)) or "none",
        "numbers": [_numbers(section, row, task) for task in (*section.tasks, None)],
        "settings": [*methods, *run.settings()],
        "flips": list(_flips(_pairs(run, store), images)),
    }


def _layers(plan: Plan) -> list[dict[str, Any]]:
    """The layers in a row, with the height of a bar for their importance in percent of the largest."""
    values = plan.importance or (0.0,) * plan.n_layers
    low, high = min(0.0, *values), max(values)
    step = max(1, math.ceil(plan.n_layers / 16))
    layers = []
    for i, value in enumerate(values):
        height = 100 * (value - low) / (high - low) if high > low else 0.0
        title = f"layer {i}: {'removed' if i in plan.removed else 'kept'}"
        title += f", importance {value:.4g}" if plan.importance else ""
        layers.append(
            {"removed": i in plan.removed, "height": f"{height:.1f}", "title": title, "numbered": i % step == 0}
        )
    return layers


def _numbers(section: Section, row: Row, task: str | None) -> list[str]:
    """A benchmark (None: the average): value with its 95 % interval, dense value, what the answers say one by one."""
    run, scale = row.first, section.scale(task)
    places = 3 if section.lower_is_better(task) else 1
    estimate = Estimate.of(run.main_metric(task)).times(scale)
    interval = estimate.interval(section.limits(task))
    dense = run.main_metric(task).get("dense")
    change = (run.result["scores"][task].get("change") if task else None) or {}
    return [
        task or "average",
        "–" if estimate.value is None else f"{estimate.value:.{places}f}",
        "–" if interval is None else f"{interval[0]:.{places}f} to {interval[1]:.{places}f}",
        "–" if dense is None else f"{scale * dense:.{places}f}",
        f"{change['p']:.2g}" if isinstance(change.get("p"), float) else "–",
        "–" if change.get("units_gained") is None else f"{change['units_gained']} / {change.get('units_lost')}",
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
        stored = _thumbnails(pruned) | _thumbnails(dense)
        ways = []
        for name, right, flips in (("lost", "dense", lost), ("gained", "pruned", gained)):
            cards = []
            for ours, theirs in flips[:MOST]:
                number = str(ours["doc_id"])
                image = f"{dense.key}/{number}" if number in stored else None
                if image:
                    images[image] = stored[number]
                cards.append(_card(ours, theirs, image))
            if cards:
                ways.append({"name": name, "right": right, "cards": cards, "more": max(0, len(flips) - MOST)})
        yield {"name": task, "n_lost": len(lost), "n_gained": len(gained), "ways": ways}


def _card(pruned: Mapping[str, Any], dense: Mapping[str, Any], image: str | None) -> dict[str, Any]:
    """A question, its answer and those of both models."""
    return {
        "image": image,
        "number": pruned["doc_id"],
        "question": _shortened(pruned["question"]),
        "expected": _shortened(pruned["target"]),
        "dense": _shortened(dense["prediction"]),
        "pruned": _shortened(pruned["prediction"]),
    }


def _shortened(value: Any) -> str:
    text = str(value).strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _thumbnails(entry: Entry) -> dict[str, str]:
    """Small images of the questions that a model answered wrong, by number, as data: addresses."""
    file = entry.path / "thumbnails.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {number: image for number, image in found.items() if str(image).startswith("data:image/")}
