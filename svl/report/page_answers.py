"""What the page needs to compare any two rows: who was right on which question, and the answers that such a pair shows.

Of every row its first seed counts. Right and wrong are one letter for each question, so that the page can count and
test any pair; texts and images are stored only of questions that some pair lists.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from svl.evaluation.score_statistics import scored_samples
from svl.report.results import stored_scores
from svl.report.rows import Row, Section
from svl.store.artifacts import Entry, Store
from svl.text.escaping import for_terminal

MOST = 8  # flipped questions that are shown of a plan, a benchmark and a direction
LONGEST = 400  # characters of a question or an answer that are shown


def row_id(row: Row) -> str:
    """What a row is called in the page and in links to it."""
    return f"r{row.first.key}"


def compared_answers(section: Section, store: Store, images: dict[str, str]) -> list[dict[str, Any]]:
    """By benchmark, what a comparison of two rows shows. Adds the images of its questions to `images`."""
    stored = {row_id(row): stored_scores(store, row.first) for row in section.rows}
    tasks = []
    for task in section.tasks:
        entries = {name: scores[task] for name, scores in stored.items() if task in scores}
        if len(entries) > 1:
            tasks.append({"name": section.short_name(task), **_compared_task(entries, images)})
    return tasks


def _compared_task(entries: Mapping[str, Entry], images: dict[str, str]) -> dict[str, Any]:
    """One benchmark. Rows that answered other questions than the first one are left out."""
    some = next(iter(entries.values()))
    first = scored_samples(some)
    numbers = list(first)
    rows: dict[str, dict[str, Any]] = {}
    right: dict[str, np.ndarray] = {}
    answers: dict[str, list[Any]] = {}  # alone: all lines of all rows may not fit in memory
    for name, entry in entries.items():
        samples = scored_samples(entry)
        if samples.keys() == first.keys():
            answers[name] = [samples[i]["prediction"] for i in numbers]
            right[name] = np.array([samples[i]["score"] >= 0.5 for i in numbers])
            text = "".join("01"[int(flag)] for flag in right[name])
            rows[name] = {"right": text, "parts": _parts(entry, [samples[i] for i in numbers])}
    wanted = _listed(right)
    for name, row in rows.items():
        row["answers"] = {i: shown_text(answers[name][i]) for i in wanted[name]}
    units = [str(first[i].get("unit", i)) for i in numbers]
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    pictures = {number: image for entry in entries.values() for number, image in thumbnails(entry).items()}
    questions = {}
    for i in sorted({i for chosen in wanted.values() for i in chosen}):
        asked = first[numbers[i]]
        questions[i] = {
            "number": for_terminal(numbers[i]),
            "question": shown_text(asked["question"]),
            "expected": shown_text(asked["target"]),
            "image": add_image(some, numbers[i], pictures, images),
        }
    unit_places = None if len(places) == len(numbers) else [places[unit] for unit in units]
    return {"units": unit_places, "questions": questions, "rows": rows}


def _listed(right: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """By row, the places of the questions that a comparison with some other row lists."""
    wanted: dict[str, set[int]] = defaultdict(set)
    for one, other in permutations(right, 2):
        flips = np.flatnonzero(right[one] & ~right[other])[:MOST].tolist()
        wanted[one] |= set(flips)
        wanted[other] |= set(flips)
    return {name: sorted(wanted[name]) for name in right}


def _parts(entry: Entry, samples: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """What every question adds to the metric, where the questions of a unit count together."""
    if not entry.output.get("scored_together") or any(sample.get("part") is None for sample in samples):
        return None
    return [sample["part"] for sample in samples]


def add_image(entry: Entry, number: Any, stored: Mapping[str, str], images: dict[str, str]) -> str | None:
    """Add the stored image of a question to `images`; gives its name there, None if there is none."""
    if str(number) not in stored:
        return None
    name = f"{entry.output['task']}@{entry.manifest['inputs'].get('benchmark')}/{number}"
    images[name] = stored[str(number)]
    return name


def shown_text(value: Any) -> str:
    """Text as the page shows it."""
    text = for_terminal(str(value).strip())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def thumbnails(entry: Entry) -> dict[str, str]:
    """Small images of the questions that a model answered wrong, by number, as data: addresses."""
    file = entry.path / "thumbnails.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {number: image for number, image in found.items() if str(image).startswith("data:image/")}
