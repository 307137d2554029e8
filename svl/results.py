"""From stored scores to a run's result: dense values beside pruned ones, averages, the retained share, costs.

Errors are standard errors. That of the retained share is paired: it comes from the change of every single sample's
score between the dense and the pruned model, which is far less noisy than comparing two independent averages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from svl.core import Plan
from svl.store import Entry


def summarise(pruned: Mapping[str, Entry], dense: Mapping[str, Entry], scales: Mapping[str, float]) -> dict[str, Any]:
    """`scores`, `average` (mean over tasks of main metric / scale) and `retained` (average / dense average).

    The last two are None without tasks, or where a main metric is undefined for this model.
    """
    scores: dict[str, Any] = {}
    for task, entry in pruned.items():
        ours, theirs = entry.output["metrics"], dense[task].output["metrics"]
        metrics = {name: {**metric, "dense": theirs[name]["value"]} for name, metric in ours.items()}
        scores[task] = {"metric": entry.output["metric"], "n": entry.output["n"], "metrics": metrics}
    main = {task: score["metrics"][score["metric"]] for task, score in scores.items()}
    value = _mean([m["value"] for m in main.values()], scales)
    reference = _mean([m["dense"] for m in main.values()], scales)
    if value is None or reference is None:
        return {"scores": scores, "average": None, "retained": None}
    average = {"value": value, "stderr": _error([m["stderr"] for m in main.values()], scales), "dense": reference}
    if reference == 0:
        return {"scores": scores, "average": average, "retained": None}
    share = value / reference
    change = _error([change_error(pruned[task], dense[task], share) for task in pruned], scales)
    retained = {"value": share, "stderr": None if change is None else change / reference}
    return {"scores": scores, "average": average, "retained": retained}


def _mean(values: list[float | None], scales: Mapping[str, float]) -> float | None:
    known = [v / s for v, s in zip(values, scales.values(), strict=True) if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _error(errors: list[float | None], scales: Mapping[str, float]) -> float | None:
    """Standard error of a mean of independent task scores."""
    known = [e / s for e, s in zip(errors, scales.values(), strict=True) if e is not None]
    return math.sqrt(sum(e * e for e in known)) / len(known) if known and len(known) == len(errors) else None


def change_error(pruned: Entry, dense: Entry, share: float = 1.0) -> float | None:
    """Standard error of the mean of `pruned - share * dense` over samples; None where samples have no score.

    Divided by the dense mean it is that of the ratio of the means (delta method), if `share` is that ratio.
    """
    ours, theirs = _sample_scores(pruned), _sample_scores(dense)
    changes = [a - share * b for i, a in ours.items() if a is not None and (b := theirs.get(i)) is not None]
    if len(changes) < 2 or len(changes) < len(ours):
        return None
    mean = sum(changes) / len(changes)
    return math.sqrt(sum((c - mean) ** 2 for c in changes) / (len(changes) - 1) / len(changes))


def _sample_scores(entry: Entry) -> dict[int, float | None]:
    rows = map(json.loads, (entry.path / "samples.jsonl").read_text().splitlines())
    return {row["doc_id"]: row["score"] for row in rows}


def cost(pruned: Mapping[str, Entry], dense: Mapping[str, Entry], plan: Plan) -> dict[str, Any]:
    """Layers and, where there are scores, parameters and samples per second (of answering, in the run that did)."""
    layers = {"layers": len(plan.kept), "layers_dense": plan.n_layers}
    if not pruned:
        return layers
    speeds = [_speed(pruned), _speed(dense)]
    if len({json.dumps(e.output["device"]) for e in (*pruned.values(), *dense.values())}) > 1:
        speeds[1] = None  # answered on another device or in other batches: no ratio
    return {
        **layers,
        "params": next(iter(pruned.values())).output["params"],
        "params_dense": next(iter(dense.values())).output["params"],
        "samples_per_second": speeds[0],
        "samples_per_second_dense": speeds[1],
    }


def _speed(entries: Mapping[str, Entry]) -> float | None:
    return sum(e.output["n"] for e in entries.values()) / sum(e.output["seconds"] for e in entries.values())
