"""From stored scores to a run's result: dense values beside pruned ones, averages, the retained share, costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from svl.core import Plan
from svl.evaluation.averages import average_problem, mean_error, mean_value, metric_error
from svl.evaluation.benchmarks import ABOVE_CHANCE, LIKELIHOOD, OFF_FORMAT
from svl.evaluation.score_statistics import change_error, compare_answers
from svl.store.artifacts import Entry

if TYPE_CHECKING:
    from svl.run.setup import RunSetup
    from svl.run.variants import ModelVariant


@dataclass
class RunStages:
    """What the stages of a run have given so far.

    Attributes:
        stats, texts, planned, patch: the artifacts of these stages.
        plan: which layers go, under this run's names.
        dense_model, pruned_model: what is evaluated.
        dense, pruned: their scores by task.
        efficiency: their speeds, if they were measured.
        recovered: the artifact of training, if there was any.
        overlap: that of its pictures compared with those of benchmarks.
    """

    stats: Entry | None
    texts: Entry | None
    planned: Entry
    plan: Plan
    patch: Entry | None
    dense_model: ModelVariant
    pruned_model: ModelVariant
    dense: dict[str, Entry] = field(default_factory=dict)
    pruned: dict[str, Entry] = field(default_factory=dict)
    efficiency: Entry | None = None
    recovered: Entry | None = None
    overlap: Entry | None = None

    @property
    def pairs(self) -> dict[str, tuple[Entry, Entry]]:
        """The pruned and the dense model's score of every task."""
        return {task: (self.pruned[task], self.dense[task]) for task in self.pruned}

    @property
    def by_name(self) -> dict[str, list[Entry]]:
        """The artifacts behind each stage as it is told to the user."""
        stages: dict[str, list[Entry | None]] = {
            "calibrate": [self.stats],
            "plan": [self.planned],
            "compensate": [self.patch],
            "evaluate": [*self.pruned.values()],
        }
        if self.texts:
            stages["generate"] = [self.texts]
        if self.efficiency:
            stages["measure"] = [self.efficiency]
        if self.recovered:
            stages["recover"] = [self.recovered]
        if self.overlap:
            stages["overlap"] = [self.overlap]
        return {name: [entry for entry in entries if entry] for name, entries in stages.items()}


NO_COMPENSATION = "svl.compensation.none.NoCompensation"  # compensation=none


def result_inputs(setup: RunSetup, stages: RunStages) -> dict[str, Any]:
    """What identifies a run: its names, settings, and the keys of its stages."""
    provenance = stages.plan.provenance
    keys = {name: [entry.key for entry in entries] for name, entries in stages.by_name.items()}
    keys["dense"] = [entry.key for entry in stages.dense.values()]
    fills = bool(stages.plan.removed) or stages.plan.is_empty  # a plan of sub-layers alone has no gap
    settings = setup.distinguishing_settings()
    return {
        "name": setup.cfg.name,
        "model": setup.name,
        "model_fingerprint": setup.fingerprint,
        "strategy": setup.choice("strategy"),
        "compensation": setup.choice("compensation") if fills else "none",
        "recovery": setup.choice("recovery") if stages.recovered else "none",
        "selector": setup.choice("selector") if setup.calibrates else None,
        "ratio": provenance["ratio"],
        "removed_share": provenance["removed_share"],
        "n_remove": provenance["n_remove"],
        "seed": setup.cfg.seed,
        "depends_on_seed": setup.depends_on_seed(),
        "limit": next((score.output["limit"] for score in stages.pruned.values()), None),
        "settings": settings if fills else {**settings, "compensation": {"_target_": NO_COMPENSATION}},
        "keys": keys,
        "scales": {task: setup.cfg.benchmark.tasks[task].scale for task in setup.tasks},
    }


def build_result(inputs: Mapping[str, Any], stages: RunStages) -> dict[str, Any]:
    """The content of result.json: `result_inputs`, and what the run has found."""
    identification = {name: value for name, value in inputs.items() if name != "scales"}
    seconds = {name: sum(entry.output["work"] for entry in entries) for name, entries in stages.by_name.items()}
    newest = next(iter(stages.pruned.values()), stages.planned)
    return {
        **identification,
        "plan": json.loads(stages.plan.to_json()),
        "cost": cost(stages.pruned, stages.dense, stages.plan),
        "efficiency": stages.efficiency.output if stages.efficiency else None,
        **summarise(stages.pruned, stages.dense, inputs["scales"]),
        "compensated": stages.patch.output["changed"] if stages.patch else [],
        "training": training(stages),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": newest.manifest["versions"],
    }


def training(stages: RunStages) -> dict[str, Any] | None:
    """What recovery cost, and whether its pictures were those of benchmarks; None without recovery."""
    if stages.recovered is None:
        return None
    names = ("steps", "samples", "tokens", "seconds", "parameters", "examples", "device")
    spent = {name: stages.recovered.output[name] for name in names}
    spent["shared_pictures"] = stages.overlap.output["shared"] if stages.overlap else None
    if stages.overlap and (videos := stages.overlap.output["videos"]):
        spent["videos_not_compared"] = videos
    return spent


def summarise(pruned: Mapping[str, Entry], dense: Mapping[str, Entry], scales: Mapping[str, float]) -> dict[str, Any]:
    """`scores`, `average` (mean over tasks of main metric / scale) and `retained` (average / dense average).

    The last two are None without tasks, where a main metric is undefined for this model, or where `average_note` says
    why tasks have none (see `averages.average_problem`); a share of a loss means nothing, so `retained` is None for
    tasks whose lower values are better, too. `beside` has the means of other metrics
    over the tasks that have them: `likelihood` (main metric / scale, of the likeliest options), `above_chance` and
    `off_format`.
    """
    scores: dict[str, Any] = {}
    for task, entry in pruned.items():
        ours, theirs = entry.output["metrics"], dense[task].output["metrics"]
        metrics = {name: {**metric, "dense": theirs[name]["value"]} for name, metric in ours.items()}
        scores[task] = {"metric": entry.output["metric"], "n": entry.output["n"], "metrics": metrics}
        scores[task] |= {name: entry.output[name] for name in ("higher_is_better", "prompt") if name in entry.output}
        scores[task]["change"] = compare_answers(entry, dense[task])
    note = average_problem(scores, scales)
    beside = averages_beside(scores, scales, note is None)
    found = {"scores": scores, "average": None, "average_note": note, "retained": None, "beside": beside}
    main = {task: score["metrics"][score["metric"]] for task, score in scores.items()}
    value = mean_value([m["value"] for m in main.values()], scales.values())
    reference = mean_value([m["dense"] for m in main.values()], scales.values())
    if note or value is None or reference is None:
        return found
    stderr = mean_error([metric_error(m) for m in main.values()], scales.values())
    found["average"] = {"value": value, "stderr": stderr, "dense": reference}
    if reference == 0 or not all(score.get("higher_is_better", True) for score in scores.values()):
        return found
    share = value / reference
    change = mean_error([change_error(pruned[task], dense[task], share) for task in pruned], scales.values())
    found["retained"] = {"value": share, "stderr": None if change is None else change / reference}
    return found


def averages_beside(scores: Mapping[str, Any], scales: Mapping[str, float], alike: bool = True) -> dict[str, Any]:
    """See `summarise`: {name: {"value", "stderr", "dense"}} of what any of the tasks has.

    That of the main metrics by likelihood only where tasks are `alike`.
    """
    found = {}
    for name in (*(["likelihood"] if alike else []), ABOVE_CHANCE, OFF_FORMAT):
        metrics, units = {}, {}
        for task, score in scores.items():
            metric = LIKELIHOOD + score["metric"] if name == "likelihood" else name
            if metric in score["metrics"]:
                metrics[task] = score["metrics"][metric]
                units[task] = scales[task] if name == "likelihood" else 1.0
        if metrics:
            every = metrics.values()
            value, dense = (mean_value([m[part] for m in every], units.values()) for part in ("value", "dense"))
            stderr = mean_error([metric_error(m) for m in every], units.values())
            found[name] = {"value": value, "stderr": stderr, "dense": dense}
    return found


def cost(pruned: Mapping[str, Entry], dense: Mapping[str, Entry], plan: Plan) -> dict[str, Any]:
    """Layers and, where there are scores, parameters and samples per second (of answering, in the run that did)."""
    layers = {"layers": len(plan.kept), "layers_dense": plan.n_layers}
    if not pruned:
        return layers
    speeds = [_speed(pruned), _speed(dense)]
    if len({json.dumps(score.output["device"]) for score in (*pruned.values(), *dense.values())}) > 1:
        speeds[1] = None  # answered on another device or in other batches: no ratio
    return {
        **layers,
        "device": next(iter(pruned.values())).output["device"],
        "params": next(iter(pruned.values())).output["params"],
        "params_dense": next(iter(dense.values())).output["params"],
        "samples_per_second": speeds[0],
        "samples_per_second_dense": speeds[1],
    }


def _speed(scores: Mapping[str, Entry]) -> float | None:
    """Samples per second over all tasks; None if they were answered together with other models'."""
    outputs = [score.output for score in scores.values()]
    if any(output["samples_per_second"] is None for output in outputs):
        return None
    return sum(output["n"] for output in outputs) / sum(output["seconds"] for output in outputs)
