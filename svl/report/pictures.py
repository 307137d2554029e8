"""Which figures a section has, from its rows, and what the store holds beside them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svl.core import Plan
from svl.report.notes import error_meaning
from svl.report.results import Run
from svl.report.rows import Row, Section
from svl.report.training_curves import training_panels
from svl.store.artifacts import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from svl.report.figures.curves import Gap, Point, Spectrum

PANELS = 4  # at most, of a figure with one panel for each plan


class Picture(NamedTuple):
    """A drawn figure: its PNG file (a PDF lies beside), and what it shows."""

    path: Path
    caption: str


class Drawing(NamedTuple):
    """A figure, the name of its file, and what it shows."""

    name: str
    figure: Figure
    caption: str


def draw_figures(section: Section, store: Store, out: Path, suffix: str) -> list[Picture]:
    """Draw a section's figures into `out`, as PNG and PDF, under names that end in `suffix`.

    A figure whose data no run has stored is left out, and so is speed where lower scores are better, or where it was
    not measured in turn with the dense model's.
    """
    from svl.report.figures import style  # here, because matplotlib takes a second that --help need not wait

    made = []
    for name, figure, caption in _drawings(section, store):
        target = out / f"{name}{suffix}.png"
        for path in (target, target.with_suffix(".pdf")):
            style.write_figure(figure, path)
        made.append(Picture(target, caption))
    return made


def _drawings(section: Section, store: Store) -> Iterator[Drawing]:
    plans = _plans(section)
    yield from _removed_drawing(section, plans)  # the cover: what all methods do, in one picture
    yield from _score_drawings(section)
    yield from _training_drawing(section)
    yield from _importance_drawing(section, plans)
    yield from _token_drawings(section)
    yield from _compensation_drawings(section, store)


def _seed_note(rows: Sequence[Row]) -> str:
    """What a figure shows of methods with several seeds, as the end of its caption."""
    counts = {len(row.runs) for row in rows} - {1}
    return f" Of several seeds ({', '.join(map(str, sorted(counts)))}), the mean." if counts else ""


# ------------------------------------------------------------------------------------------------- scores


def _score_drawings(section: Section) -> Iterator[Drawing]:
    """Scores against ratio and against speed."""
    from svl.report.figures import curves

    points: dict[str, list[Point]] = {label: [] for label in section.labels}
    for row in section.rows:
        if (point := _point(section, row)) is not None:
            points[row.label].append(point)
    every = [point for found in points.values() for point in found]
    if not every:
        return
    scale, dense = section.scale(None), section.dense(None)
    reference = None if dense is None else scale * dense
    ylabel = "average over the benchmarks" + (" (%)" if scale == 100 else "")
    labels = curves.Labels(section.title, ylabel)
    seeds = _seed_note(section.rows)
    bars = f"Bars: one {error_meaning(section)}."
    bars += " Dots: single seeds." if seeds else ""
    caption = f"Average over the benchmarks against the layers removed. {bars}{seeds}"
    yield Drawing("accuracy_vs_ratio", curves.accuracy_vs_ratio(points, reference, labels), caption)
    is_timed = section.clock is not None and section.clock.what == "answer"  # while answering, other work counts, too
    if not is_timed or section.lower_is_better(None) or all(math.isnan(point.speed) for point in every):
        return
    how = "one answer, measured in turn with the dense model"
    caption = f"Average over the benchmarks against the speed-up of {how}; grey: the Pareto front. {bars}{seeds}"
    if others := sum(math.isnan(point.speed) for point in every):
        caption += f" Left out: {others} of {len(every)} plans, whose speed was measured under other conditions."
    yield Drawing("accuracy_vs_speed", curves.accuracy_vs_speed(points, reference, labels), caption)


def _point(section: Section, row: Row) -> Point | None:
    """A row's average with its error bar, and its speed; None if the average is unknown."""
    from svl.report.figures.curves import Point

    estimate = row.score(None).times(section.scale(None))
    if estimate.value is None:
        return None
    scale, values = section.scale(None), [run.main_metric(None).get("value") for run in row.runs]
    seeds = tuple(scale * value for value in values if value is not None) if len(values) > 1 else ()
    point = Point(row.ratio, estimate.value, *estimate.bar(estimate.value, section.limits(None)), seeds=seeds)
    speed = section.speed(row)
    return point if speed is None else point._replace(speed=speed)


def _training_drawing(section: Section) -> Iterator[Drawing]:
    """Scores against what recovery cost, where the same was trained for several budgets."""
    from svl.report.figures import training
    from svl.report.figures.curves import Labels

    found = training_panels(section)
    if not found.panels:
        return
    scale, dense = section.scale(None), section.dense(None)
    reference = None if dense is None else scale * dense
    labels = Labels(section.title, "average over the benchmarks" + (" (%)" if scale == 100 else ""))
    figure = training.accuracy_vs_training(found.panels, reference, found.unit, labels)
    caption = (
        f"Average over the benchmarks against what recovery cost, in {found.unit}; solid: after a compensation, "
        f"dashed: without. Bars: one {error_meaning(section)}.{_seed_note(section.rows)}"
    )
    if found.others:
        caption += (
            f" Left out: {found.others} rows with one budget only or of further choices of layers (see the table)."
        )
    yield Drawing("accuracy_vs_training", figure, caption)


# ------------------------------------------------------------------------------------------------- layers


Plans = dict[str, dict[float, list[Plan]]]  # by label and ratio, one for each seed


def _plans(section: Section) -> Plans:
    plans: Plans = {label: {} for label in section.labels}
    for row in section.rows:
        plans[row.label][row.ratio] = row.plans
    return plans


def _removed_drawing(section: Section, plans: Plans) -> Iterator[Drawing]:
    """Which layers go."""
    from svl.report.figures import layers

    if not any(plan.removal_names for ratios in plans.values() for found in ratios.values() for plan in found):
        return
    caption = "Layers removed by every method and ratio"
    caption += "; above, how many methods remove each layer." if len(plans) > 1 else "."
    if any(plan.sublayers for ratios in plans.values() for found in ratios.values() for plan in found):
        caption += " Half as dark: its attention or its MLP alone."
    caption += " Of several seeds, the paler a layer the fewer of them remove it." if _seed_note(section.rows) else ""
    yield Drawing("removed_layers", layers.removed_layers(plans, title=section.title), caption)


def _importance_drawing(section: Section, plans: Plans) -> Iterator[Drawing]:
    """Importance of layers, of the methods that tell them apart."""
    from svl.report.figures import layers

    lowest = {label: found[min(found)] for label, found in plans.items()}
    ranked = {label: found for label, found in lowest.items() if all(_tells_layers_apart(plan) for plan in found)}
    if not ranked:
        return
    seeds = _seed_note(section.rows)
    crosses = "crosses are removed at the lowest ratio" + (" by most seeds" if seeds else "")
    caption = f"Importance of layers, by rank; {crosses}.{seeds}"
    jointly = [label for label, found in ranked.items() if not all(_removes_the_least_important(p) for p in found)]
    if jointly:
        caption += (
            f" {', '.join(jointly)}: layers are chosen together (as one block, or one after another), so the "
            "crosses need not be at the lowest ranks."
        )
    figure = layers.importance_rank_heatmap(ranked, jointly=jointly, title=section.title)
    yield Drawing("importance", figure, caption)


def _tells_layers_apart(plan: Plan) -> bool:
    """Whether a plan has importance, and not the same for all layers."""
    return len(set(plan.importance)) > 1


def _removes_the_least_important(plan: Plan) -> bool:
    """Whether no kept layer is less important than a removed one."""
    kept = [plan.importance[i] for i in plan.kept]
    return not plan.removed or not kept or max(plan.importance[i] for i in plan.removed) <= min(kept)


# ------------------------------------------------------------------------------------------------- tokens


def _token_drawings(section: Section) -> Iterator[Drawing]:
    """One calibration sample through the eyes of every selector."""
    from svl.report.figures import tokens

    seen = set()
    for run in section.runs:
        selector, image, numbers = run.result["selector"], run.folder / "example.png", run.folder / "example.json"
        name = "token_importance-" + re.sub(r"[^A-Za-z0-9]+", "_", selector or "none")
        if name in seen or not image.is_file() or not numbers.is_file():
            continue
        seen.add(name)
        example = json.loads(numbers.read_text(encoding="utf-8"))
        if _scores_are_equal(example):
            continue
        figure = tokens.token_importance(image, example, title=f"{section.title}, {selector}")
        yield Drawing(
            name, figure, f"Tokens that selector '{selector}' prefers, in one sample (seed {run.result['seed']})."
        )


def _scores_are_equal(example: Mapping[str, Any]) -> bool:
    """Whether a selector prefers no token to another."""
    texts = [(score, weight) for _, score, weight in example["text"]]
    return len({*zip(example["visual"], example["visual_selected"], strict=False)}) < 2 and len({*texts}) < 2


# ------------------------------------------------------------------------------------------ compensations


def _compensation_drawings(section: Section, store: Store) -> Iterator[Drawing]:
    """What is left of the dense model's hidden states, and what the subspace compensation saw."""
    from svl.report.figures import curves

    if gaps := _gaps(section, store):
        caption = "Distance from the dense model's hidden states, on samples; dashed: without compensation."
        figure = curves.feature_gap(gaps, title=section.title)
        yield Drawing("feature_gap", figure, caption + _seed_note(section.rows))
    if spectra := _spectra(section, store):
        caption = "Singular values of the feature gaps that the subspace compensation saw; dotted: its rank."
        yield Drawing("spectrum", curves.spectrum(spectra, title=section.title), caption)


def _gaps(section: Section, store: Store) -> dict[str, dict[str, Gap]]:
    """By ratio and label, the gaps that scripts/feature_gap.py stored; of several seeds the mean."""
    from svl.report.figures.curves import Gap

    stored = {entry.output["run"]: entry.output for entry in store.entries("gap")}
    panels: dict[str, dict[str, Gap]] = defaultdict(dict)
    for row in section.rows:
        found = [stored[run.key] for run in row.runs if run.key in stored]
        if not found:
            continue
        alone: dict[int, list[float]] = defaultdict(list)
        patched: dict[int, list[float]] = defaultdict(list)
        for gap in found:
            for layer, before, after in zip(gap["layers"], gap["alone"], gap["patched"], strict=True):
                alone[layer].append(before)
                patched[layer].append(after)
        layers = sorted(alone)
        panels[f"{100 * row.ratio:g} % of the layers removed"][row.label] = Gap(
            layers, [statistics.fmean(alone[i]) for i in layers], [statistics.fmean(patched[i]) for i in layers]
        )
    return dict(list(panels.items())[:PANELS])


def _spectra(section: Section, store: Store) -> dict[str, dict[str, Spectrum]]:
    """By plan and changed layer, the spectra of the patches of each method's highest ratio, of its first seed."""
    highest = {row.label: row for row in section.rows}
    panels = {}
    for label in section.labels:
        row = highest[label]
        seed = f", seed {row.first.result['seed']}" if len(row.runs) > 1 else ""
        if spectra := _run_spectra(row.first, store):
            panels[f"{label}, {100 * row.ratio:g} %{seed}"] = spectra
    return dict(list(panels.items())[:PANELS])


def _run_spectra(run: Run, store: Store) -> dict[str, Spectrum]:
    """By changed layer, what the run's patch stored; empty if it is of another compensation."""
    from svl.report.figures.curves import Spectrum

    rank = run.result["settings"].get("compensation", {}).get("rank")
    for key in (run.result.get("keys") or {}).get("compensate", []):
        entry = store.read(store.root / "patch" / key)
        stored = (entry.output.get("spectra") if entry else None) or {}
        if stored and rank:
            ordered = sorted(stored.items(), key=lambda item: int(item[0]))
            return {f"layer {i}": Spectrum(found["values"], found["squares"], rank) for i, found in ordered}
    return {}
