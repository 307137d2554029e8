"""Where a task of svl changes the scoring of lmms-eval's: the metrics of both, from the same answers."""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from svl.core.errors import reason_of
from svl.evaluation.benchmarks import UPSTREAM
from svl.text.escaping import for_terminal

log = logging.getLogger(__name__)


def corrected_config(original: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The configuration of lmms-eval's task with what svl changes; of two ways of scoring, both."""
    entries = [entry for entry in original["metric_list"] if entry["metric"] != "submission"]  # files for a server
    ours, theirs = own.get("process_results"), original.get("process_results")
    if ours is None or theirs is None:
        return {**original, **own, "metric_list": own.get("metric_list") or entries}
    upstream = UpstreamScoring(own["task"], theirs)

    def both(document: Mapping[str, Any], answers: list[str]) -> dict[str, Any]:
        items = ours(document, answers)  # first: some of lmms-eval's change the document
        return {**upstream.items(document, answers), **items}

    beside = [upstream.entry(entry) for entry in entries]
    return {**original, **own, "metric_list": [*own["metric_list"], *beside], "process_results": both}


class UpstreamScoring:
    """lmms-eval's own scoring of a task. Where it fails, its metrics are undefined, and a warning says so once."""

    def __init__(self, task: str, process_results: Callable[..., dict[str, Any]]):
        self.task, self.process_results = task, process_results
        self.failed = False

    def items(self, document: Mapping[str, Any], answers: list[str]) -> dict[str, Any]:
        """Its item for each of its metrics; nothing once it has failed."""
        chance = random.getstate()
        random.seed(repr(document))  # some draw letters where they cannot read one: the same in every run, at least
        try:
            found = self.process_results(document, answers)
        except Exception as error:  # noqa: BLE001 (code of others, for a number beside)
            self._fail(error)
            return {}
        finally:
            random.setstate(chance)
        return {UPSTREAM + name: item for name, item in found.items()}

    def entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        """One of its metrics, as the task's YAML lists it, under its name here."""
        renamed = {**entry, "metric": UPSTREAM + entry["metric"]}
        aggregate = entry.get("aggregation")
        if callable(aggregate):
            renamed["aggregation"] = self._undefined_where_it_fails(aggregate)
        return renamed

    def _undefined_where_it_fails(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(aggregate)  # lmms-eval looks at its parameters
        def aggregate_or_nan(items: list[Any], **more: Any) -> Any:
            if self.failed:
                return math.nan
            try:
                return aggregate(items, **more)
            except Exception as error:  # noqa: BLE001 (as above)
                self._fail(error)
                return math.nan

        return aggregate_or_nan

    def _fail(self, error: Exception) -> None:
        if not self.failed:
            reason = for_terminal(reason_of(error))
            log.warning("  %s: lmms-eval's own scoring fails, so its metrics are left out: %s", self.task, reason)
        self.failed = True
