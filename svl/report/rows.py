"""From finished runs to rows that can be compared."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from svl.core import Plan

Run = dict[str, Any]  # the result of one run, as in result.json


class Estimate(NamedTuple):
    """A number and its error (standard error, or standard deviation over seeds), None where unknown."""

    value: float | None
    error: float | None = None


def merge(estimates: Sequence[Estimate]) -> Estimate:
    """One run: itself. Several seeds: mean and sample standard deviation; a value missing in one is missing."""
    if len(estimates) == 1:
        return estimates[0]
    values = [e.value for e in estimates if e.value is not None]
    if len(values) < len(estimates):
        return Estimate(None)
    return Estimate(statistics.fmean(values), statistics.stdev(values))


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: name of the method.
        runs: their results, ascending by seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def ratio(self) -> float:
        """Fraction of layers removed, as asked for."""
        return self.runs[0]["ratio"]

    @property
    def plan(self) -> Plan:
        """What the first of the runs removed."""
        plan = self.runs[0]["plan"]
        return Plan(plan["n_layers"], tuple(plan["removed"]), tuple(plan["importance"] or ()))

    def score(self, task: str | None) -> Estimate:
        """Main metric of a benchmark, or the average over all (None)."""
        return merge([_estimate(main_metric(run, task)) for run in self.runs])

    @property
    def retained(self) -> Estimate:
        """The average as a fraction of the dense one."""
        return merge([_estimate(run["retained"] or {}) for run in self.runs])

    @property
    def throughput(self) -> Estimate:
        """Samples per second as a multiple of the dense model's, while answering the benchmarks."""
        names = ("samples_per_second", "samples_per_second_dense")
        pairs = [[run["cost"].get(name) for name in names] for run in self.runs]
        return merge([Estimate(value / dense if value is not None and dense else None) for value, dense in pairs])

    @property
    def speedup(self) -> Estimate:
        """Time of a whole answer, dense over pruned, where efficiency was measured."""
        return merge([Estimate((run.get("efficiency") or {}).get("speedup", {}).get("total", {}).get("value"))
                      for run in self.runs])  # fmt: skip


def main_metric(run: Run, task: str | None) -> dict[str, Any]:
    """Value, stderr and dense value of a benchmark's main metric, or of the average (None); empty where undefined."""
    if task is None:
        return run["average"] or {}
    return run["scores"][task]["metrics"][run["scores"][task]["metric"]]


def _estimate(body: dict[str, Any]) -> Estimate:
    return Estimate(body.get("value"), body.get("stderr"))


class Method(NamedTuple):
    """What a row is about; equal for runs that differ in a seed only."""

    strategy: str
    selector: str
    compensation: str
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, run: Run) -> Method:
        """The method of a run."""
        settings = tuple((name, value) for name, value in settings_of(run) if not name.endswith(".seed"))
        return cls(run["strategy"], run["selector"] or "none", run["compensation"] or "none", settings)

    def label(self, methods: Iterable[Method]) -> str:
        """The strategy's name; where `methods` use it in several ways, what tells them apart in brackets."""
        same = [other for other in methods if other.strategy == self.strategy]
        differs = [self[i] for i in (1, 2) if len({other[i] for other in same}) > 1]
        alike = [dict(other.settings) for other in same if other[:3] == self[:3]]
        differs += [f"{k}={v}" for k, v in self.settings if any(other.get(k) != v for other in alike)]
        return self.strategy + (f" ({', '.join(map(str, differs))})" if differs else "")


def _seeds(run: Run) -> list[Any]:
    """The run's seed, and those of its parts."""
    return [run["seed"], *(value for name, value in settings_of(run) if name.endswith(".seed"))]


def settings_of(run: Run) -> Iterator[tuple[str, str]]:
    """Settings of a run's strategy, selector (if it used one) and compensation as ("selector.p", "0.5")."""
    for group, settings in sorted(run.get("settings", {}).items()):
        if run.get(group, "") is not None:
            for name, value in sorted(settings.items()):
                if name != "_target_":
                    yield f"{group}.{name}", value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Section:
    """What goes into one table: runs of one model on the same benchmarks with the same sample limit.

    Attributes:
        experiment: its name.
        runs: their results, oldest first; the last speaks for what all have in common.
    """

    experiment: str
    runs: tuple[Run, ...]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.runs[-1]["model"]

    @property
    def title(self) -> str:
        """Experiment, model and, where there is one, the limit."""
        limit = self.runs[-1]["limit"]
        return f"{self.experiment}: {self.model}" + ("" if limit is None else f" (limit={limit:g})")

    @property
    def tasks(self) -> list[str]:
        """The benchmarks."""
        return list(self.runs[-1]["scores"])

    @cached_property
    def rows(self) -> list[Row]:
        """Ascending by ratio, then by label; of runs with equal seeds, the newest."""
        groups: dict[tuple[Any, ...], dict[str, Run]] = {}
        for run in self.runs:
            seeds = groups.setdefault((run["ratio"], run["n_remove"], Method.of(run)), {})
            seeds[json.dumps(_seeds(run))] = run
        methods = {method for _, _, method in groups}
        rows = [
            Row(method.label(methods), tuple(sorted(seeds.values(), key=lambda run: run["seed"])))
            for (_, _, method), seeds in groups.items()
        ]
        return sorted(rows, key=lambda row: (row.ratio, row.runs[0]["n_remove"], row.label))

    def dense(self, task: str | None) -> float | None:
        """The unpruned model's main metric of a benchmark, or its average (None)."""
        return main_metric(self.runs[-1], task).get("dense")

    def lower(self, task: str | None) -> bool:
        """Whether lower values of a benchmark (None: of any) are better."""
        scores = self.runs[-1]["scores"]
        return any(not scores[t].get("higher_is_better", True) for t in (scores if task is None else (task,)))

    def scale(self, task: str | None) -> int:
        """100 where all values of a benchmark (None: the averages) are fractions, to be shown in %; else 1."""
        if self.lower(task):
            return 1
        found = [value for run in self.runs for key in ("value", "dense") if (value := main_metric(run, task).get(key))]
        return 100 if all(abs(value) <= 1 for value in found) else 1

    @property
    def timed(self) -> bool:
        """Whether efficiency was measured for every row, so that speeds are those of measured answers."""
        return all(row.speedup.value is not None for row in self.rows)

    def speed(self, row: Row) -> float | None:
        """How many times as fast as the dense model a row is: measured if all are, else while answering."""
        return (row.speedup if self.timed else row.throughput).value

    def notes(self) -> list[str]:
        """What a reader must know to read the table."""
        run = self.runs[-1]
        rate = run["cost"].get("samples_per_second_dense")
        tasks = ", ".join(f"{t} ({s['metric']}, n = {s['n']})" for t, s in run["scores"].items())
        speed = "samples per second relative to the dense model" + (f" ({rate:.3g} per second)" if rate else "")
        if self.timed:
            speed = "time of one answer, dense over pruned, both measured in turn (median of the rounds)"
        notes = [
            f"Benchmarks: {tasks or 'none'}.",
            "±: standard error over the samples; in rows of several seeds, standard deviation over the seeds.",
            "Retained: average relative to the dense average. Bold: the best at that ratio.",
            f"Speed: {speed}.",
        ]
        if run["limit"] is not None:
            notes.insert(0, f"Caution: limit={run['limit']:g}, so only a part of every benchmark was used.")
        if len({main_metric(run, None).get("dense") for run in self.runs}) > 1:
            notes.append("Caution: the dense average differs between runs (versions? device?); the newest is shown.")
        if (versions := len({versions_of(run) for run in self.runs})) > 1:
            notes.append(f"Caution: the runs were made with {versions} different sets of versions.")
        if older := len(self.runs) - sum(len(row.runs) for row in self.rows):
            notes.append(f"Left out: {older} older run(s) with the same method, ratio and seed as a newer one.")
        return notes


def versions_of(run: Run) -> str:
    """Names and versions of what a run was made with."""
    return ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))


def sections(experiment: str, runs: Iterable[Run]) -> list[Section]:
    """Comparable runs (oldest first), sorted by model; whole benchmarks before limited ones."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        tasks = tuple(sorted((task, score["metric"]) for task, score in run["scores"].items()))
        limit = math.inf if run["limit"] is None else run["limit"]
        groups.setdefault((run["model"], -limit, tasks), []).append(run)
    return [Section(experiment, tuple(groups[key])) for key in sorted(groups)]
