"""Mirroring a run to the tracker: what there is to show of it, finished or failed. No failure here costs a result."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.config import plain_values
from svl.core import Plan
from svl.core.contract import method_name
from svl.evaluation import score_statistics
from svl.processes import process_rank
from svl.run.keys import method_settings
from svl.run.strategy_inputs import read_statistics
from svl.store.files import digest
from svl.text.redaction import redact_text, redact_values
from svl.trackers.mirroring import mirror_in_time
from svl.trackers.record import Record, Tracker

if TYPE_CHECKING:
    from svl.run.run_result import RunStages
    from svl.run.setup import RunSetup
    from svl.store.artifacts import Entry

log = logging.getLogger(__name__)

REMOVALS = {"removed": 1.0, "removed_attn": 0.5, "removed_mlp": 0.5}  # lists of layers in a plan: the share that goes


class NotTrackedError(Exception):
    """A tracker failed."""


def track_run(setup: RunSetup, folder: Path, stages: RunStages, run: Entry) -> None:
    """Stage `track`: mirror a finished run to every tracker, once. Failing to do so changes no result."""

    @cache
    def record() -> Record:
        return describe_run(setup, folder, stages, run)

    for name, tracker in setup.trackers.items():

        def build(_: Path, name: str = name, tracker: Tracker = tracker) -> dict[str, Any]:
            with not_costing_the_result(name):
                return {"run": run.key, "location": mirror_in_time(tracker, record())}

        settings = {"class": method_name(tracker), **redact_values(method_settings(tracker))}
        try:
            setup.store.make("track", {"run": run.key, "tracker": settings}, build)
        except NotTrackedError as error:
            log.warning("  the run is stored, but not tracked; running it again tracks it: %s", error)


def track_failure(setup: RunSetup, folder: Path, error: Exception) -> None:
    """Show a failed run where finished ones are, too. It has no result whose key it could have."""
    if process_rank() > 0:
        return
    reason = redact_text(" ".join(f"{type(error).__name__}: {error}".split()))
    key, run = f"failed-{digest(plain_values(setup.cfg))}", f"{setup.name}-{setup.choice('strategy')}-failed"
    for name, tracker in setup.trackers.items():
        try:
            with not_costing_the_result(name):
                mirror_in_time(tracker, Record(key=key, name=run, error=reason, **labels(setup, folder, "prune")))
        except NotTrackedError as problem:
            log.warning("  the failure is not tracked: %s", problem)


@contextmanager
def not_costing_the_result(name: str) -> Iterator[None]:
    """Within the block, whatever is raised becomes a NotTrackedError of the tracker called `name`.

    Deliberately broad: a mirror that breaks (no disk, no server, no login, an interface that changed) must not take
    hours of computed results with it.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NotTrackedError(f"{name} failed: {reason}") from error


def describe_run(setup: RunSetup, folder: Path, stages: RunStages, run: Entry) -> Record:
    """What there is to show of a finished run."""
    result, plan = run.output, run.output["plan"]
    measured = [score.output for score in stages.pruned.values()] + [result["efficiency"] or {}]
    facts = {"versions": result["versions"], "keys": result["keys"], "device": measured[0].get("device")}
    report = [folder / name for name in ("result.json", "flips.md")]
    flips = [
        {"task": task, **flip} for task, pair in stages.pairs.items() for flip in score_statistics.flip_rows(*pair)
    ]
    return Record(
        key=run.key,
        name=run_name(setup, run),
        result=result,
        curves=layer_curves(setup, plan, stages.stats),
        training=stages.recovered.output["curve"] if stages.recovered else (),
        flips=flips,
        figures=draw_run_figures(result, folder),
        files={"plan": [folder / "plan.json"], "report": [file for file in report if file.exists()]},
        **labels(setup, folder, "prune" if any(plan.get(name) for name in REMOVALS) else "evaluate", **facts),
    )


def run_name(setup: RunSetup, run: Entry) -> str:
    """A readable name that no other run has: methods, ratio, settings given by hand, seed, beginning of the key."""
    result = run.output
    parts = [setup.name, result["strategy"], f"r{result['ratio']:g}", result["selector"] or "data-free"]
    if result["compensation"] != "none":
        parts.append(result["compensation"])
    if result["recovery"] != "none":
        parts.append(result["recovery"])
    parts += [setup.choice(group) for group in setup.combined]
    parts += setup.settings_given()
    if setup.cfg.seed:
        parts.append(f"seed={setup.cfg.seed}")
    return "-".join([*parts, run.key[:4]])


def labels(setup: RunSetup, folder: Path, kind: str, **facts: Any) -> dict[str, Any]:
    """What a record says of the configuration, whether the run finished or failed."""
    names = {"model": setup.name}
    names |= {group: setup.choice(group) for group in ("strategy", "selector", "compensation", "recovery")}
    names["benchmark"] = setup.cfg.benchmark.name
    return {
        "group": setup.cfg.name,
        "kind": kind,
        "folder": folder,
        "tags": [f"{group}:{name}" for group, name in names.items()],
        "config": {**redact_values(plain_values(setup.cfg)), "svl": {"versions": setup.store.versions, **facts}},
    }


def layer_curves(setup: RunSetup, plan: dict[str, Any], stats: Entry | None) -> dict[str, list[float]]:
    """Numbers per decoder layer."""
    removed = [0.0] * plan["n_layers"]
    for name, part in REMOVALS.items():
        for i in plan.get(name) or ():
            removed[i] = part
    curves: dict[str, list[float]] = {"removed": removed}
    if plan["importance"]:
        curves["importance"] = plan["importance"]
    if stats and setup.selects and "cosine" in setup.statistics:
        curves["cosine"] = read_statistics(setup, stats).cosine().tolist()
    return curves


def draw_run_figures(result: dict[str, Any], folder: Path) -> dict[str, Path]:
    """The run's figures, drawn into the output folder."""
    from svl.report.figures import layers, style

    plan = Plan.from_json(json.dumps(result["plan"]))
    drawing = layers.importance_bar_charts({result["strategy"]: {result["ratio"]: plan}})
    return {"importance": style.write_figure(drawing, folder / "importance.png")}
