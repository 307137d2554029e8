"""What a run shows to people, and what shows it: the vocabulary of trackers. The store stays the truth.

Nothing is ever read back from a tracker, and no failure of one costs a result: whatever it raises, the pipeline makes
one warning of it. A tracker file imports this module and, when it is called, the library that it is named after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svl.core import Method


@dataclass(frozen=True)
class Record:
    """A finished run, or one that failed.

    Attributes:
        key: one key, one run: that of the result in the store; of a failed run, made from its configuration.
        name: readable name, e.g. "demo_lvlm-short_lvlm-r0.25-tis".
        group: name of the experiment; its sweep may be resumed under it on another day.
        kind: "prune", or "evaluate" if no layer was removed.
        tags: short labels, e.g. "strategy:short_lvlm".
        config: resolved settings as plain nested values, with `svl`: versions, commit, device and keys in the store.
        folder: output folder of the run.
        result: content of result.json; empty if the run failed.
        error: why it failed, in one line.
        curves: one number per decoder layer of the dense model by name ("importance", "cosine", ...).
        training: points of the curve of recovery: `step`, `seconds`, `loss`, its terms, `learning_rate`.
        flips: questions that pruning gained or lost, see svl.evaluation.score_statistics.flip_rows.
        figures: PNG files by title.
        files: what belongs to the run's "plan" and to its "report".
    """

    key: str
    name: str
    group: str
    kind: str
    tags: Sequence[str]
    config: Mapping[str, Any]
    folder: Path
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    training: Sequence[Mapping[str, float]] = ()
    flips: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Every number of the result, under the same names whatever the strategy; missing values are left out.

        `eval/<task>/<metric>`, `eval/average` and `eval/retained`, the same under `stderr/`, `dense/`, `low/` and
        `high/` (95 % intervals); `change/<task>/<x>`, `samples/<task>`, `prune/<x>`, `cost/<x>`,
        `efficiency/<part>/<x>`, `training/<x>`, `seconds/<stage>`.
        """
        if not self.result:
            return {}
        result = self.result
        estimates = {
            f"{task}/{metric}": estimate
            for task, score in result["scores"].items()
            for metric, estimate in score["metrics"].items()
        }
        estimates |= {name: result[name] or {} for name in ("average", "retained")}
        tree = {
            **{part: {name: e.get(value) for name, e in estimates.items()} for part, value in ESTIMATE.items()},
            "change": {task: score.get("change") for task, score in result["scores"].items()},
            "samples": {task: score["n"] for task, score in result["scores"].items()},
            "prune": {name: result.get(name) for name in ("ratio", "n_remove", "seed", "limit")},
            **{part: result.get(part) for part in ("cost", "efficiency", "training", "seconds")},
        }
        return {name: value for name, value in flatten(tree) if isinstance(value, int | float)}

    def layers(self) -> list[dict[str, float]]:
        """The curves as points, one for each layer: its number as `layer`, and its values."""
        depth = max(map(len, self.curves.values()), default=0)
        return [{"layer": i, **{name: values[i] for name, values in self.curves.items()}} for i in range(depth)]


# parts of an estimate, and what result.json calls them
ESTIMATE = {"eval": "value", "stderr": "stderr", "dense": "dense", "low": "low", "high": "high"}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by their path: {"a": {"b": 1, "value": 2}} gives a/b = 1 and a = 2."""
    for name, value in tree.items():
        path = prefix if name == "value" and prefix else f"{prefix}/{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from flatten(value, path)
        else:
            yield path, value


@dataclass(frozen=True)
class Tracker(Method, ABC):
    """Where runs are mirrored: a frozen dataclass whose fields are its settings.

    Attributes:
        timeout: seconds that mirroring one run may take; then it is given up, and the run is kept.
    """

    timeout: float = 120.0

    def check(self) -> None:
        """Called before any work is done: find out now what would be refused at the end. Asks no server.

        Raises:
            SvlError: if settings or environment variables cannot be right, or a library is not installed.
        """

    def each(self, name: str) -> Mapping[str, Tracker]:
        """The trackers that this one stands for, by name: itself, called `name`. Each is asked on its own."""
        return {name: self}

    @abstractmethod
    def mirror(self, record: Record) -> str | None:
        """Show a run there, replacing what is there under its key.

        May raise anything: a mirror that breaks (no disk, no server, no login, an interface that changed) costs no
        result, and the run is mirrored when it is run again. Names of metrics and settings may hold any character;
        a tracker that allows fewer maps them.

        Returns:
            The folder or address of what it made; None if it made nothing.
        """
