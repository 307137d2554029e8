"""Whether a result has what reports read of it: one that is damaged or foreign is named, and breaks no other."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from svl.core import Plan, SvlError

Kinds = tuple[type, ...]
NULL = type(None)
MISSING = object()

# What every result has, by path, and of which kind it is.
NEEDED: dict[str, Kinds] = {
    "name": (str,),
    "model": (str,),
    "model_fingerprint": (str,),
    "strategy": (str,),
    "selector": (str, NULL),
    "compensation": (str, NULL),
    "ratio": (Real,),
    "n_remove": (int,),
    "seed": (int,),
    "limit": (Real, NULL),
    "plan": (Mapping,),
    "plan.n_layers": (int,),
    "plan.removed": (list,),
    "plan.importance": (list, NULL),
    "cost": (Mapping,),
    "cost.layers_dense": (int,),
    "scores": (Mapping,),
    "average": (Mapping, NULL),
    "retained": (Mapping, NULL),
    "seconds": (Mapping,),
    "settings": (Mapping,),
    "versions": (Mapping,),
}
# What it may have.
OPTIONAL: dict[str, Kinds] = {
    "removed_share": (Real,),
    "cost.params": (int, NULL),
    "cost.params_dense": (int, NULL),
    "cost.samples_per_second": (Real, NULL),
    "cost.samples_per_second_dense": (Real, NULL),
    "average_note": (str, NULL),
    "beside": (Mapping, NULL),
    "recovery": (str, NULL),
    "training": (Mapping, NULL),
    "training.steps": (int,),
    "training.samples": (int,),
    "training.tokens": (int,),
    "training.seconds": (Real,),
    "training.device": (Mapping,),
    "training.shared_pictures": (int, NULL),
    "training.videos_not_compared": (int,),
    "efficiency": (Mapping, NULL),
    "efficiency.speedup": (Mapping,),
    "efficiency.speedup.total": (Mapping,),
    "efficiency.speedup.total.value": (Real, NULL),
    "keys": (Mapping, NULL),
    "keys.evaluate": (list,),
    "keys.dense": (list,),
    "keys.compensate": (list,),
    "settings.calibration": (Mapping,),
    "settings.compensation.rank": (int, NULL),
}


def problem_of(result: Any) -> str | None:
    """What keeps a result from being reported (it is damaged, or of another version of svl), or None."""
    for path, kinds in {**NEEDED, **OPTIONAL}.items():
        value = _value_at(result, path)
        if value is MISSING and path in NEEDED:
            return f"'{path}' is missing"
        if value is not MISSING and (not isinstance(value, kinds) or isinstance(value, bool)):
            return f"'{path}' is of the wrong kind"
    if not 0 <= result["ratio"] < 1:
        return f"the ratio is {result['ratio']:g}"
    try:
        plan_of(result)
    except (SvlError, TypeError) as error:
        return str(error)
    return _problem_of_parts(result)


def plan_of(result: Mapping[str, Any]) -> Plan:
    """What a run removed.

    Raises:
        SvlError, TypeError: if its result holds no plan.
    """
    plan = result["plan"]
    return Plan(
        plan["n_layers"],
        tuple(plan["removed"]),
        tuple(plan["importance"] or ()),
        removed_attn=tuple(plan.get("removed_attn") or ()),
        removed_mlp=tuple(plan.get("removed_mlp") or ()),
    )


def _value_at(tree: Any, path: str) -> Any:
    """What nested mappings have at "a.b"; MISSING where that ends."""
    value = tree
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def _problem_of_parts(result: Mapping[str, Any]) -> str | None:
    """What is wrong with parts whose names are not known beforehand, or None."""
    for name, settings in result["settings"].items():
        if not isinstance(settings, Mapping):
            return f"the settings of '{name}' are no mapping"
    for name, keys in (result.get("keys") or {}).items():
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            return f"the keys of '{name}' are no list of names"
    averages = {name: result[name] or {} for name in ("average", "retained")} | dict(result.get("beside") or {})
    for name, estimate in averages.items():
        if not isinstance(estimate, Mapping) or not _is_estimate(estimate):
            return f"'{name}' has something else than numbers"
    for task, score in result["scores"].items():
        if problem := _problem_of_score(score):
            return f"the scores of '{task}' {problem}"
    return None


def _problem_of_score(score: Any) -> str | None:
    """What is wrong with the scores of one benchmark, or None."""
    metrics, metric = _value_at(score, "metrics"), _value_at(score, "metric")
    if not isinstance(metrics, Mapping) or not isinstance(_value_at(score, "n"), int):
        return "lack metrics or the number of samples"
    if not isinstance(metric, str) or metric not in metrics:
        return "lack the main metric"
    for name, estimate in metrics.items():
        if not isinstance(estimate, Mapping) or not _is_estimate(estimate):
            return f"have no number for '{name}'"
    change = score.get("change") or {}
    if not isinstance(change, Mapping) or not isinstance(change.get("note"), str | None):
        return "do not tell what changed"
    if not all(isinstance(change.get(name), Real | None) for name in ("p", "units_gained", "units_lost")):
        return "have no numbers of what changed"
    return None


def _is_estimate(estimate: Mapping[str, Any]) -> bool:
    """Whether all values are numbers, or null."""
    return all(isinstance(value, Real | None) for value in estimate.values())
