"""Results of finished runs, read from the store and checked before anything is made of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from svl.core import Plan, SvlError, did_you_mean
from svl.evaluation.averages import average_problem
from svl.report.result_check import plan_of, problem_of
from svl.store.artifacts import Entry, Store
from svl.text.escaping import for_terminal

log = logging.getLogger(__name__)
ESTIMATE = ("value", "stderr", "dense", "low", "high")  # of a metric; the last two are its 95 % interval


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        key: its key in the store.
        created: when it was made, in seconds since 1970.
        result: its result, as in result.json.
        folder: of its files in the store.
        scales: by task, what its main metric is divided by in the average; 1 where none is given.
    """

    key: str
    created: float
    result: Mapping[str, Any]
    folder: Path
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """What it removed."""
        return plan_of(self.result)

    @property
    def tasks(self) -> list[str]:
        """Its benchmarks."""
        return list(self.result["scores"])

    @property
    def weights(self) -> tuple[Any, ...]:
        """Equal for runs whose pruned models are the same: what they remove, and what was stored under which key.

        A score is stored once for equal layers and weights, whatever led to them.
        """
        keys = self.result.get("keys") or {}
        stored = keys.get("evaluate") or keys.get("recover") or keys.get("compensate") or [self.key]
        return (self.plan.removal_names, *stored)

    def main_metric(self, task: str | None) -> Mapping[str, Any]:
        """A benchmark's main metric, or the average over all (None): value, stderr, dense and so on.

        Empty where undefined.
        """
        if task is None:
            return {} if self.average_problem else self.result["average"] or {}
        score = self.result["scores"][task]
        return score["metrics"][score["metric"]]

    @cached_property
    def average_problem(self) -> str | None:
        """Why an average over its benchmarks would mean nothing, also of results that have one; None if it does."""
        return average_problem(self.result["scores"], self.scales)

    @property
    def retained(self) -> Mapping[str, Any]:
        """The average as a fraction of the dense one, as `main_metric`; empty where undefined."""
        return {} if self.average_problem else self.result["retained"] or {}

    def beside(self, name: str) -> Mapping[str, Any]:
        """The average of another metric than the main ones ("off_format"), as `main_metric`; empty where unknown."""
        return (self.result.get("beside") or {}).get(name) or {}

    @property
    def evaluation(self) -> dict[str, Any]:
        """How its answers were had, where that was not as usual: prompt style, caps, frames, evaluator."""
        settings = self.result["settings"]
        styles = {"style": dict(settings["style"])} if settings.get("style") else {}
        return {**(settings.get("evaluation") or {}), **styles}

    @property
    def trained_on(self) -> str | None:
        """Type and name of the device that recovery trained on, and how many processes shared it; None without one."""
        training = self.result.get("training")
        if not training:
            return None
        device = training.get("device") or {}
        name = " ".join(str(device[part]) for part in ("type", "name") if device.get(part)) or "unknown device"
        return f"{name}, {device['processes']} processes" if device.get("processes", 1) > 1 else name

    def settings(self) -> Iterator[tuple[str, str]]:
        """Settings of its methods and of what else tells runs apart, as ("selector.p", "0.5"); only of what it used."""
        for group, settings in sorted(self.result["settings"].items()):
            if self.result.get(group, "") is not None:
                for name, value in sorted(settings.items()):
                    if name != "_target_":
                        yield f"{group}.{name}", value if isinstance(value, str) else json.dumps(value)

    def numbers(self) -> Iterator[tuple[Any, ...]]:
        """Every number of the result: group, task, metric, main, n, and what ESTIMATE names."""
        result = self.result
        for task, score in result["scores"].items():
            for name, metric in score["metrics"].items():
                is_main = int(name == score["metric"])
                values = [metric.get(part) for part in ESTIMATE]
                yield "eval", task, name, is_main, score["n"], *values
        averages = {"average": self.main_metric(None), "retained": self.retained} | (result.get("beside") or {})
        for name, metric in averages.items():
            yield "eval", "", name, 0, "", *(metric.get(part) for part in ESTIMATE)
        for group in ("cost", "training", "seconds"):
            for name, value in (result.get(group) or {}).items():
                if not name.endswith("_dense") and not isinstance(value, Mapping):
                    yield group, "", name, 0, "", value, None, result[group].get(f"{name}_dense"), None, None

    @property
    def versions(self) -> str:
        """Names and versions of what it was made with."""
        return ", ".join(f"{name} {version}" for name, version in sorted(self.result["versions"].items()))


def run_of(entry: Entry) -> Run:
    """The run that an artifact of the store holds.

    Raises:
        ValueError: if its manifest does not tell when it was made.
    """
    created = datetime.fromisoformat(entry.manifest["created"]).timestamp()
    return Run(entry.key, created, entry.output, entry.path, entry.manifest["inputs"].get("scales") or {})


def stored_scores(store: Store, run: Run, which: str = "evaluate") -> dict[str, Entry]:
    """By task, the run's scores ("evaluate") or those of its dense model ("dense") that are in the store."""
    keys = (run.result.get("keys") or {}).get(which, [])
    found = [store.read(store.root / "score" / key) for key in keys]
    return {score.output["task"]: score for score in found if score and "task" in score.output}


def runs_by_experiment(store: Store) -> dict[str, set[str]]:
    """The keys of all finished runs, readable or not, by the name of their experiment."""
    found: dict[str, set[str]] = {}
    for entry in store.entries("run"):
        name = entry.output.get("name") if isinstance(entry.output, Mapping) else None
        if isinstance(name, str):
            found.setdefault(name, set()).add(entry.key)
    return found


def read_runs(store: Store, name: str | None) -> tuple[Run, ...]:
    """The finished runs of experiment `name`, oldest first.

    A run that cannot be reported, because it is damaged or of another version of svl, is named in a warning and left
    out.

    Raises:
        SvlError: if no run is left, or `name` is None: says which experiments there are.
    """
    found = list(store.entries("run"))
    if not found:
        raise SvlError(_no_runs(store))
    names = [entry.output.get("name") for entry in found if isinstance(entry.output, Mapping)]
    known = sorted({word for word in names if isinstance(word, str)})
    if name is None or name not in known:
        answer = f"no finished run of experiment '{name}'" if name else "which experiment? Give experiment=NAME"
        raise SvlError(f"{answer}{did_you_mean(name or '', known)}; {store.root} has: {', '.join(known)}")
    ours = [entry for entry in found if isinstance(entry.output, Mapping) and entry.output.get("name") == name]
    problems = {entry.key: problem_of(entry.output) for entry in ours}
    for key, problem in problems.items():
        if problem is not None:
            log.warning(for_terminal(f"run {key} is left out: {problem} (damaged, or of another version of svl?)"))
    runs = [run_of(entry) for entry in ours if problems[entry.key] is None]
    if not runs:
        reason = f"they are of another version of svl: {problems[ours[-1].key]}"
        raise SvlError(f"no run of '{name}' in {store.root} can be read; {reason}")
    return tuple(sorted(runs, key=lambda run: (run.created, run.key)))


def _no_runs(store: Store) -> str:
    """That there is no such store, or where the runs may be instead."""
    if not store.root.is_dir():
        return f"there is no store {store.root}; run an experiment first, or name another store with store=DIR"
    inner = store.root / "store"
    hint = f" (did you mean store={inner}?)" if (inner / "run").is_dir() else ""
    return f"no finished run in the store {store.root}{hint}; run one first, or name another with store=DIR"
