"""Which figures a section has, from its rows, and what the store holds beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svl.core import Plan
from svl.report.files import whole
from svl.report.rows import Row, Section
from svl.store import Entry, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 4  # at most, of a figure with one panel for each plan


class Picture(NamedTuple):
    """A drawn figure: its PNG file (a PDF lies beside), and what it shows."""

    path: Path
    caption: str


def draw(section: Section, entries: Sequence[Entry], store: Store, out: Path, suffix: str) -> list[Picture]:
    """Draw a section's figures into `out`, as PNG and PDF, under names that end in `suffix`.

    A figure whose data no run has stored is left out, and so is speed where lower scores are better.
    """
    from svl import figures  # here, because matplotlib takes a second that --help need not wait

    made = []
    for name, figure, caption in _figures(section, entries, store):
        target = out / f"{name}{suffix}.png"
        for path in (target, target.with_suffix(".pdf")):
            with whole(path) as temporary:
                figures.save(figure, temporary)
        made.append(Picture(target, caption))
    return made


def _figures(section: Section, entries: Sequence[Entry], store: Store) -> Iterator[tuple[str, Figure, str]]:
    from svl import figures

    title, scale, dense = section.title, section.scale(None), section.dense(None)
    rows = sorted(section.rows, key=lambda row: row.label)
    labels = list(dict.fromkeys(row.label for row in rows))  # all figures give a method the same colour
    points: dict[str, list[Any]] = {label: [] for label in labels}
    speeds: dict[str, list[Any]] = {label: [] for label in labels}
    plans: dict[str, dict[float, Plan]] = {label: {} for label in labels}
    for row in rows:
        plans[row.label][row.ratio] = row.plan
        value, error = (None if x is None else scale * x for x in row.score(None))
        if value is None:
            continue
        points[row.label].append((row.ratio, value, error))
        if (speed := section.speed(row)) is not None:
            speeds[row.label].append((speed, value, error, row.ratio))
    unit = " (%)" if scale == 100 else ""
    style: Any = {"title": title, "ylabel": f"average over the benchmarks{unit}"}
    reference = None if dense is None else scale * dense
    if any(points.values()):
        figure = figures.accuracy_vs_ratio(points, reference, **style)
        yield "accuracy_vs_ratio", figure, "Average over the benchmarks against the layers removed."
    if any(speeds.values()) and not section.lower(None):
        how = "one answer, measured in turn with the dense model" if section.timed else "answering the benchmarks"
        figure = figures.accuracy_vs_speed(speeds, reference, xlabel="speed-up", **style)
        yield "accuracy_vs_speed", figure, f"Average over the benchmarks against the speed-up of {how}; grey: the best."
    first = {label: plan for label in labels if (plan := plans[label][min(plans[label])]).importance}
    if first:
        caption = "Importance of layers, by rank; crosses are removed at the lowest ratio."
        yield "importance", figures.importance_map(first, title=title), caption
    yield "removed_layers", figures.removed_layers(plans, title=title), "Layers removed by every method and ratio."
    runs = {entry.key: entry for entry in entries if any(entry.output is run for run in section.runs)}
    yield from _tokens(title, runs)
    if gaps := _gaps(rows, runs, store):
        caption = "Distance from the dense model's hidden states, on samples; dashed: without compensation."
        yield "feature_gap", figures.feature_gap(gaps, title=title), caption
    if spectra := _spectra(rows, store):
        caption = "Singular values of the feature gaps that the subspace compensation saw; dotted: its rank."
        yield "spectrum", figures.spectrum(spectra, title=title), caption


def _tokens(title: str, runs: dict[str, Entry]) -> Iterator[tuple[str, Figure, str]]:
    """One calibration sample through the eyes of every selector."""
    from svl import figures

    seen = set()
    for entry in runs.values():
        selector, image, numbers = entry.output["selector"], entry.path / "example.png", entry.path / "example.json"
        name = "token_importance-" + re.sub(r"[^A-Za-z0-9]+", "_", selector or "none")
        if name not in seen and image.is_file() and numbers.is_file():
            seen.add(name)
            figure = figures.token_importance(image, json.loads(numbers.read_text()), title=f"{title}, {selector}")
            yield name, figure, f"Tokens that selector '{selector}' prefers."


def _gaps(rows: Sequence[Row], runs: dict[str, Entry], store: Store) -> dict[str, dict[str, Any]]:
    """By ratio and label, the gaps that scripts/feature_gap.py stored; the newest of each run."""
    stored = {entry.output["run"]: entry.output for entry in store.entries("gap")}
    panels: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row.ratio):
        for key in (key for key, entry in runs.items() if entry.output is row.runs[0] and key in stored):
            gap = stored[key]
            heading = f"{100 * row.ratio:g} % of the layers removed"
            panels.setdefault(heading, {})[row.label] = (gap["layers"], gap["alone"], gap["patched"])
    return dict(list(panels.items())[:PANELS])


def _spectra(rows: Sequence[Row], store: Store) -> dict[str, dict[str, Any]]:
    """By plan and changed layer, the spectra of the patches of each method's highest ratio."""
    highest = {row.label: row for row in sorted(rows, key=lambda row: row.ratio)}
    panels = {}
    for label, row in sorted(highest.items()):
        run = row.runs[0]
        rank = (run.get("settings") or {}).get("compensation", {}).get("rank")
        for key in run.get("keys", {}).get("compensate", []):
            entry = store.read(store.root / "patch" / key)
            spectra = entry.output.get("spectra") if entry else None
            if spectra and rank:
                panels[f"{label}, {100 * row.ratio:g} %"] = {
                    f"layer {layer}": (found["values"], found["squares"], rank)
                    for layer, found in sorted(spectra.items(), key=lambda item: int(item[0]))
                }
    return dict(list(panels.items())[:PANELS])
