"""Which curves of score against the budget of recovery a section has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from svl.report.rows import Row, Section, Variant

if TYPE_CHECKING:
    from svl.report.figures.training import Cost, Panel

STEPS, SECONDS = "recovery.steps", "recovery.budget_s"  # settings that a curve goes along
PANELS = 4  # at most: those with the most curves

Settings = tuple[tuple[str, str], ...]


class _Part(NamedTuple):
    """A method and its settings."""

    name: str
    settings: Settings

    def label(self, others: Collection[_Part]) -> str:
        """Its name, and the settings in which `others` of that name differ; empty for no method."""
        rivals = [dict(other.settings) for other in others if other.name == self.name]
        differences = [f"{k}={v}" for k, v in self.settings if any(rival.get(k) != v for rival in rivals)]
        return "" if self.name == "none" else ", ".join([self.name, *differences])


class _Way(NamedTuple):
    """How the models of a curve were made: their layers, what they start from, how they were trained."""

    ratio: float
    layers: _Part
    start: _Part
    training: _Part

    @classmethod
    def of(cls, row: Row) -> _Way:
        """That of a row, whatever its budget."""
        made = Variant.of(row.first)
        groups: dict[str, list[tuple[str, str]]] = {"compensation": [], "recovery": [], "else": []}
        for name, value in made.settings:
            if name not in (STEPS, SECONDS):
                groups.get(name.partition(".")[0], groups["else"]).append((name, value))
        layers = [("selector", made.selector), *groups["else"]]
        return cls(
            row.ratio,
            _Part(made.strategy, tuple(layers)),
            _Part(made.compensation, tuple(groups["compensation"])),
            _Part(made.recovery, tuple(groups["recovery"])),
        )


@dataclass(frozen=True)
class TrainingPanels:
    """What the figure shows.

    Attributes:
        panels: by heading, one for every choice of layers that was trained; PANELS at most.
        unit: of budgets: seconds of training where all of them were limited by seconds, else steps.
        others: rows that were trained and are not shown: with one budget only, or in further panels.
    """

    panels: dict[str, Panel]
    unit: str
    others: int


def training_panels(section: Section) -> TrainingPanels:
    """Curves of what was trained alike for two budgets or more, from the score without training on."""
    ways: dict[_Way, list[Row]] = {}
    untrained: dict[tuple[Any, ...], Row] = {}
    for row in section.rows:
        way = _Way.of(row)
        if row.first.result.get("training"):
            ways.setdefault(way, []).append(row)
        else:
            untrained[way[:3]] = row
    ways = {way: [row for row in rows if row.score(None).value is not None] for way, rows in ways.items()}
    curves = {way: rows for way, rows in ways.items() if len(rows) > 1}
    every = [row for rows in curves.values() for row in rows]
    in_seconds = all(dict(row.first.settings()).get(SECONDS, "null") != "null" for row in every)
    measure = "seconds" if in_seconds else "steps"
    unit = f"seconds of training ({_devices(every)})" if in_seconds else "steps of the optimiser"
    every_place = list(dict.fromkeys(way[:2] for way in curves))  # in the order of the rows, as the curves are
    places = sorted(every_place, key=lambda place: -sum(way[:2] == place for way in curves))[:PANELS]
    headings = {
        (ratio, layers): f"{100 * ratio:g} % of the layers removed by {layers.label([p[1] for p in places])}"
        for ratio, layers in every_place
        if (ratio, layers) in places
    }
    panels = {
        heading: _panel(section, {way: curves[way] for way in curves if way[:2] == place}, untrained, measure)
        for place, heading in headings.items()
    }
    shown = sum(len(rows) for way, rows in curves.items() if way[:2] in places)
    return TrainingPanels(panels, unit, sum(map(len, ways.values())) - shown)


def _panel(
    section: Section, curves: dict[_Way, list[Row]], untrained: dict[tuple[Any, ...], Row], measure: str
) -> Panel:
    """The curves of one choice of layers, and the scores that they start from."""
    from svl.report.figures.training import Panel, Training

    starts, trainings = {way.start for way in curves}, {way.training for way in curves}
    found, levels = [], {}
    for way, rows in curves.items():
        begin, after = untrained.get(way[:3]), way.start.label(starts)
        start = _cost(section, begin, measure) if begin else None
        points = [start, *(_cost(section, row, measure) for row in rows)]
        found.append(Training(way.training.label(trainings), after, tuple(sorted(filter(None, points)))))
        if start:
            levels[after] = start.value
    return Panel(found, levels)


def _cost(section: Section, row: Row, measure: str) -> Cost | None:
    """A row's average with its error bar, and what it cost; None if the average is unknown."""
    from svl.report.figures.training import Cost

    estimate, spent = row.score(None).times(section.scale(None)), row.spent(measure).value
    if estimate.value is None or spent is None:
        return None
    return Cost(spent, estimate.value, *estimate.bar(estimate.value, section.limits(None)))


def _devices(rows: Sequence[Row]) -> str:
    """What these were trained on."""
    return "; ".join(sorted({run.trained_on for row in rows for run in row.runs if run.trained_on}))
