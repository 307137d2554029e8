"""Published scores of dense models, which stand beside one's own dense row: where both differ, something differs."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache

from svl.report.paper import is_model, numbers_file
from svl.report.rows import Section

FILE = numbers_file("published_scores.csv")
TOLERANCE = 3.0  # points, of 100; a difference above it is said
FULL_SCORES = {"mme": 2000}  # where the highest score is not 100
CAUSES = (
    "centre crop or padding of pictures, the system prompt (model.prompt), OCR tokens in the prompt, another split or "
    "version of the data, how answers are read"
)


@dataclass(frozen=True)
class PublishedScore:
    """A score as it was published; not measured with this code.

    Attributes:
        model, method, layers_kept: of what; the method is `dense`, or one that removes layers.
        benchmark: its file in conf/benchmark.
        compares_with: "main", or the one metric of the benchmark that it stands beside; empty: none.
        value: in percent, or in the benchmark's points.
        protocol: how it was measured, as far as it is known.
        source: who published it.
    """

    model: str
    method: str
    layers_kept: str
    benchmark: str
    compares_with: str
    value: float
    protocol: str
    source: str


@cache
def published_scores() -> tuple[PublishedScore, ...]:
    """All of them, in the order of the file."""
    with open(FILE, newline="", encoding="utf-8") as file:
        return tuple(PublishedScore(value=float(row.pop("value")), **row) for row in csv.DictReader(file))


def dense_scores(model: str, task: str, metric: str) -> list[PublishedScore]:
    """What was published of a dense model on the benchmark of a task, for the metric that is shown."""
    benchmark = task.removeprefix("svl_")
    return [
        score
        for score in published_scores()
        if score.method == "dense"
        and score.benchmark == benchmark
        and score.compares_with in ("main", metric)
        and is_model(score.model, model)
    ]


def published_notes(section: Section) -> list[str]:
    """Published scores of the section's dense model, and a caution where its own lie far from all of them."""
    notes = []
    for task in section.tasks:
        score = section.last.result["scores"][task]
        found = dense_scores(section.model, task, score["metric"])
        if not found:
            continue
        listing = "; ".join(f"{entry.value:g} ({entry.protocol}: {_short(entry.source)})" for entry in found)
        notes.append(f"Published, not measured here: dense {found[0].model} on {task}: {listing}.")
        own = section.dense(task)
        if own is None or section.limit is not None:
            continue
        shown = own * 100 if section.scale(task) == 100 else own
        nearest = min(abs(shown - entry.value) for entry in found) * 100 / FULL_SCORES.get(found[0].benchmark, 100)
        if nearest > TOLERANCE:
            notes.append(
                f"Caution: the dense {task} here, {shown:.1f}, lies {nearest:.1f} points or more from every "
                f"published value. Usual causes: {CAUSES}."
            )
    return notes


def _short(source: str) -> str:
    """A source without what it says in brackets."""
    return re.sub(r"\s*\(.*", "", source)
