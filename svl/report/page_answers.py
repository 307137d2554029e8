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
    answers = {name: scored_samples(entry) for name, entry in entries.items()}
    first = next(iter(answers.values()))
    answers = {name: samples for name, samples in answers.items() if samples.keys() == first.keys()}
    numbers = list(first)
    right = {name: np.array([s["score"] >= 0.5 for s in samples.values()]) for name, samples in answers.items()}
    wanted = _listed(right)
    units = [first[i].get("unit", i) for i in numbers]
    places = {unit: place for place, unit in enumerate(dict.fromkeys(map(str, units)))}
    entry, pictures = next(iter(entries.values())), {k: v for e in entries.values() for k, v in thumbnails(e).items()}
    questions = {}
    for i in sorted({i for chosen in wanted.values() for i in chosen}):
        asked, image = first[numbers[i]], add_image(entry, numbers[i], pictures, images)
        questions[i] = {
            "number": for_terminal(numbers[i]),
            "question": shortened(asked["question"]),
            "expected": shortened(asked["target"]),
            "image": image,
        }
    return {
        "units": None if len(places) == len(numbers) else [places[str(unit)] for unit in units],
        "questions": questions,
        "rows": {
            name: {
                "right": "".join("01"[int(flag)] for flag in right[name]),
                "parts": _parts(entries[name], list(samples.values())),
                "answers": {i: shortened(samples[numbers[i]]["prediction"]) for i in wanted[name]},
            }
            for name, samples in answers.items()
        },
    }


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
    if not entry.output.get("scored_together") or not all("part" in sample for sample in samples):
        return None
    return [sample["part"] for sample in samples]


def add_image(entry: Entry, number: Any, stored: Mapping[str, str], images: dict[str, str]) -> str | None:
    """Add the stored image of a question to `images`; gives its name there, None if there is none."""
    if str(number) not in stored:
        return None
    name = f"{entry.output['task']}@{entry.manifest['inputs'].get('benchmark')}/{number}"
    images[name] = stored[str(number)]
    return name


def shortened(value: Any) -> str:
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
