"""From finished runs to rows that can be compared."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from svl.core import Plan
from svl.evaluation.averages import metric_error
from svl.evaluation.score_statistics import NORMAL_95
from svl.report.results import Run

PARTS = ("selector", "compensation", "recovery")  # of a method, beside its strategy
BESIDE = ("likelihood", "above_chance", "off_format")  # averages besides that of the main metrics, as tables show them


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, None where unknown (never 0: then samples say nothing about it).

    Attributes:
        error: over the questions, and over seeds where there are several.
        low, high: its 95 % interval, where the run that measured it gave one.
        draws: the part of the error that is over seeds; None of a single run.
    """

    value: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    draws: float | None = None

    @property
    def questions(self) -> float | None:
        """The part of the error that is over the questions; None where unknown."""
        if self.error is None or self.draws is None:
            return self.error
        return math.sqrt(max(self.error**2 - self.draws**2, 0.0)) or None

    @classmethod
    def of(cls, metric: Mapping[str, Any] | None) -> Estimate:
        """That of a metric in a result."""
        value, low, high = ((metric or {}).get(name) for name in ("value", "low", "high"))
        return cls(value, metric_error(metric), low, high)

    def times(self, scale: float) -> Estimate:
        """It in a unit of 1 / `scale`."""
        values = (self.value, self.error, self.low, self.high, self.draws)
        return Estimate(*(None if x is None else scale * x for x in values))

    def interval(self, limits: tuple[float, float] | None) -> tuple[float, float] | None:
        """Its 95 % interval within `limits` (those of a proportion), None where unknown."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        if self.value is None or self.error is None:
            return None
        return _within(limits, self.value, NORMAL_95 * self.error)

    def bar(self, value: float, limits: tuple[float, float] | None) -> tuple[float, float]:
        """The ends of an error bar around `value`, one error on either side but within `limits`."""
        return _within(limits, value, self.error or 0.0)


def _within(limits: tuple[float, float] | None, value: float, reach: float) -> tuple[float, float]:
    """`value` ± `reach`, no end outside of the limits (but for a value that is)."""
    low, high = limits or (-math.inf, math.inf)
    return max(value - reach, min(low, value)), min(value + reach, max(high, value))


def pool_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """One run: itself. Several seeds: their mean; a value missing in one is missing.

    The error of a mean adds up that over the questions, which are the same for all seeds, and that over seeds.
    """
    if len(estimates) == 1:
        return estimates[0]
    values = [e.value for e in estimates if e.value is not None]
    if len(values) < len(estimates):
        return Estimate(None)
    known = [e.error for e in estimates if e.error is not None]
    questions = math.hypot(*known) / math.sqrt(len(known) or 1)
    draws = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), math.hypot(questions, draws) or None, draws=draws)


class Clock(NamedTuple):
    """Under which conditions a speed was measured; speeds of different clocks are not compared.

    Attributes:
        what: "answer": dense and pruned model in turn; "benchmarks": each while it answered them.
        conditions: device, batch size and the like, as text; empty where a result does not tell.
    """

    what: str
    conditions: str


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the dense model a run was, and by which clock."""

    value: float
    clock: Clock


def answer_speed(run: Run) -> Speed | None:
    """From the time of one whole answer, where efficiency was measured."""
    measured = run.result.get("efficiency") or {}
    value = measured.get("speedup", {}).get("total", {}).get("value")
    conditions = {name: measured.get(name) for name in ("device", "sequence", "new_tokens")}
    return None if value is None else Speed(value, Clock("answer", _conditions(conditions)))


def benchmark_speed(run: Run) -> Speed | None:
    """From the samples per second while answering the benchmarks."""
    cost = run.result["cost"]
    rate, dense = cost.get("samples_per_second"), cost.get("samples_per_second_dense")
    if rate is None or not dense:
        return None
    return Speed(rate / dense, Clock("benchmarks", _conditions(cost.get("device"))))


def _conditions(facts: Any) -> str:
    """Facts about a measurement in one line, those that are unknown left out; of a device its type and name."""
    if not isinstance(facts, Mapping):
        return "" if facts is None else str(facts)
    words = [" ".join(str(facts[name]) for name in ("type", "name") if facts.get(name))]
    for name, value in facts.items():
        if name not in ("type", "name") and (text := _conditions(value)):
            words.append(text if name == "device" else f"{name.replace('_', ' ')} {text}")
    return ", ".join(word for word in words if word)


class Variant(NamedTuple):
    """What was done to the model: equal for runs that differ in a seed only."""

    strategy: str
    selector: str
    compensation: str
    recovery: str
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, run: Run) -> Variant:
        """That of a run."""
        settings = tuple((name, value) for name, value in run.settings() if not name.endswith(".seed"))
        selector, compensation, recovery = (str(run.result.get(name) or "none") for name in PARTS)
        return cls(run.result["strategy"], selector, compensation, recovery, settings)

    def label(self, variants: Iterable[Variant]) -> str:
        """The strategy's name; where `variants` use it in several ways, what tells them apart in brackets."""
        same = [other for other in variants if other.strategy == self.strategy]
        parts = [(name, getattr(self, name)) for name in PARTS if len({getattr(other, name) for other in same}) > 1]
        differences = [f"{name}={choice}" if choice == "none" else choice for name, choice in parts]
        alike = [dict(other.settings) for other in same if other[:4] == self[:4]]
        differences += [f"{k}={v}" for k, v in self.settings if any(other.get(k) != v for other in alike)]
        return self.strategy + (f" ({', '.join(differences)})" if differences else "")

    @property
    def order(self) -> tuple[Any, ...]:
        """What tables sort by: a model without a part before those with one, numbers as numbers."""
        parts = [(getattr(self, name) != "none", getattr(self, name)) for name in PARTS]
        return self.strategy, parts, [(name, _with_numbers(value)) for name, value in self.settings]


def _with_numbers(text: str) -> list[str | float]:
    """Text and numbers in turn, so that 5 comes before 10."""
    words = re.split(r"((?:(?<!\w)-)?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(word) if place % 2 else word for place, word in enumerate(words)]


def _what_was_run(run: Run) -> tuple[float, int, Variant, str]:
    """Ratio, number of layers, method and settings; last, the run's seed and those of its parts."""
    result = run.result
    parts = [value for name, value in run.settings() if name.endswith(".seed")]
    return result["ratio"], result["n_remove"], Variant.of(run), json.dumps([result["seed"], *parts])


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: name of the method.
        runs: ascending by seed. Where all of them made the same model, or none depends on its seed and all have equal
            scores, one run and not a sample over seeds: the first stands for all.
        seeds: with how many seeds it was run.
    """

    label: str
    runs: tuple[Run, ...]
    seeds: int

    @classmethod
    def of(cls, label: str, runs: Iterable[Run]) -> Row:
        """The row of runs with different seeds."""
        ordered = tuple(sorted(runs, key=lambda run: run.result["seed"]))
        is_same = len({run.weights for run in ordered}) == 1 or (
            not any(run.result.get("depends_on_seed", True) for run in ordered)
            and all(run.result["scores"] == ordered[0].result["scores"] for run in ordered)
        )
        return cls(label, ordered[:1] if is_same else ordered, len(ordered))

    @property
    def first(self) -> Run:
        """The run with the lowest seed."""
        return self.runs[0]

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self.first.result["strategy"]

    @property
    def ratio(self) -> float:
        """Fraction of layers removed, as asked for."""
        return self.first.result["ratio"]

    @property
    def plans(self) -> list[Plan]:
        """What each of the runs removed."""
        return [run.plan for run in self.runs]

    def score(self, task: str | None) -> Estimate:
        """Main metric of a benchmark, or the average over all (None)."""
        return pool_estimates([Estimate.of(run.main_metric(task)) for run in self.runs])

    def beside(self, name: str) -> Estimate:
        """The average over the benchmarks of another metric than the main ones."""
        return pool_estimates([Estimate.of(run.beside(name)) for run in self.runs])

    def spent(self, name: str) -> Estimate:
        """What recovery cost, by name ("steps"); 0 without recovery."""
        return pool_estimates([Estimate(float((run.result.get("training") or {}).get(name) or 0)) for run in self.runs])

    @property
    def retained(self) -> Estimate:
        """The average as a fraction of the dense one."""
        return pool_estimates([Estimate.of(run.retained) for run in self.runs])


@dataclass(frozen=True)
class Section:
    """What goes into one table: runs of one model on the same benchmarks, asked in the same way, with the same limit.

    Attributes:
        experiment: its name.
        runs: oldest first; the last speaks for what all have in common.
    """

    experiment: str
    runs: tuple[Run, ...]

    @property
    def last(self) -> Run:
        """The newest run."""
        return self.runs[-1]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.last.result["model"]

    @property
    def limit(self) -> float | None:
        """How many samples of each benchmark were used, or which share; None: all."""
        return self.last.result["limit"]

    @property
    def title(self) -> str:
        """Experiment, model, the limit where there is one, and what is unusual about the evaluation."""
        unusual = [] if self.limit is None else [f"limit={self.limit:g}"]
        for name, value in self.last.evaluation.items():
            if isinstance(value, Mapping) and list(value) == self.tasks and len(set(map(str, value.values()))) == 1:
                value = value[self.tasks[0]]  # the same for all tasks
            unusual.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
        return f"{self.experiment}: {self.model}" + (f" ({', '.join(unusual)})" if unusual else "")

    @property
    def tasks(self) -> list[str]:
        """The benchmarks."""
        return self.last.tasks

    @cached_property
    def rows(self) -> list[Row]:
        """Ascending by ratio, then by what was done; of runs with equal seeds, the newest."""
        groups: dict[tuple[Any, ...], dict[str, Run]] = {}
        for run in self.runs:
            *group, seeds = _what_was_run(run)
            groups.setdefault(tuple(group), {})[seeds] = run
        variants = {variant for _, _, variant in groups}
        rows = [Row.of(variant.label(variants), runs.values()) for (_, _, variant), runs in groups.items()]
        return sorted(rows, key=lambda row: (row.ratio, row.first.result["n_remove"], Variant.of(row.first).order))

    @cached_property
    def labels(self) -> list[str]:
        """Those of the rows, once each, in one order whatever their ratios."""
        return list(dict.fromkeys(row.label for row in sorted(self.rows, key=lambda row: Variant.of(row.first).order)))

    @property
    def replaced(self) -> list[tuple[Run, Run]]:
        """Runs that are not shown, each with the one that is shown for its settings and seeds."""
        shown = {_what_was_run(run): run for run in self.runs}
        return [(run, shown[_what_was_run(run)]) for run in self.runs if run is not shown[_what_was_run(run)]]

    def short_name(self, task: str) -> str:
        """A benchmark's name for people: without svl's mark and what all of the section's begin with."""
        names = [name.removeprefix("svl_") for name in self.tasks]
        shared = ""
        if len(names) > 1:
            shared = re.sub(r"[^_]*$", "", os.path.commonprefix(names))  # noqa: RUF071 (of names, not of paths)
        return task.removeprefix("svl_").removeprefix(shared).replace("_", " ")

    def dense(self, task: str | None) -> float | None:
        """The unpruned model's main metric of a benchmark, or its average (None)."""
        return self.last.main_metric(task).get("dense")

    @property
    def recovers(self) -> bool:
        """Whether any run was trained after pruning."""
        return any(run.result.get("training") for run in self.runs)

    @property
    def metrics_beside(self) -> list[str]:
        """Names of the averages that any run has besides that of the main metrics."""
        return [name for name in BESIDE if any(run.beside(name) for run in self.runs)]

    def dense_beside(self, name: str) -> float | None:
        """The unpruned model's average of another metric than the main ones, in the newest run that has it."""
        return next((found["dense"] for run in reversed(self.runs) if (found := run.beside(name))), None)

    def lower_is_better(self, task: str | None) -> bool:
        """Whether lower values of a benchmark (None: of any) are better."""
        scores = self.last.result["scores"]
        return any(not scores[t].get("higher_is_better", True) for t in (scores if task is None else (task,)))

    def scale(self, task: str | None) -> int:
        """100 where all values of a benchmark (None: the averages) are fractions, to be shown in %; else 1."""
        if self.lower_is_better(task):
            return 1
        found = [run.main_metric(task).get(key) for run in self.runs for key in ("value", "dense")]
        return 100 if all(abs(value) <= 1 for value in found if value is not None) else 1

    def limits(self, task: str | None) -> tuple[float, float] | None:
        """Between which values a benchmark's shown metric lies: 0 and 100 for percentages, else None."""
        return (0.0, 100.0) if self.scale(task) == 100 else None

    @cached_property
    def clock(self) -> Clock | None:
        """The clock of the speeds that are shown; None if none was measured.

        That of measured answers if all rows have one, else that of answering the benchmarks; of several devices or
        batch sizes, the one that most runs have.
        """
        every = [run for row in self.rows for run in row.runs]
        answers, benchmarks = (
            [speed.clock for run in every if (speed := measure(run))] for measure in (answer_speed, benchmark_speed)
        )
        clocks = answers if len(answers) == len(every) else benchmarks
        return Counter(reversed(clocks)).most_common(1)[0][0] if clocks else None

    def speed(self, row: Row) -> float | None:
        """How many times as fast as the dense model a row is; None if unknown, or measured by another clock."""
        measure = answer_speed if self.clock and self.clock.what == "answer" else benchmark_speed
        found = [measure(run) for run in row.runs]
        values = [speed.value for speed in found if speed and speed.clock == self.clock]
        return statistics.fmean(values) if values and len(values) == len(found) else None


def compared_runs(experiment: str, runs: Iterable[Run]) -> list[Section]:
    """Comparable runs (oldest first), sorted by model; whole benchmarks before limited ones, usual settings first."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        result = run.result
        tasks = tuple(sorted((task, score["metric"]) for task, score in result["scores"].items()))
        limit = math.inf if result["limit"] is None else result["limit"]
        evaluation = json.dumps(run.evaluation, sort_keys=True) if run.evaluation else ""
        groups.setdefault((result["model"], -limit, tasks, evaluation), []).append(run)
    return [Section(experiment, tuple(groups[key])) for key in sorted(groups)]
