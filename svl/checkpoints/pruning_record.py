"""What a checkpoint's config.json tells about its pruning, under `layer_pruning`; also of one that is pruned again.

    {"n_layers": 12, "removed": [3], ..., "compensated": ["4.mlp"], "key": null, "base_model": "owner/name",
     "trained": ["model.layers.4", "model.multi_modal_projector"],
     "history": [{"n_layers": 16, "removed": [1, 2, 9, 10], ...}], "original": {"n_layers": 16, "removed": [...]}}

`removed` and `compensated` are numbers of the model that was pruned; `original` has those of the first one.

What was converted says so beside it, under `converted_from`; `base_model` is missing if it has no hub id:

    {"source": "owner/name", "fingerprint": "12ab...", "base_model": "owner/name"}
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from svl.core.errors import SvlError
from svl.core.patch import Patch
from svl.core.plan import Plan

log = logging.getLogger(__name__)

FIELD = "layer_pruning"
CONVERTED = "converted_from"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def changed_writers(patch: Patch | None) -> list[str]:
    """What a patch changes: "<layer>.<writer>", "<layer>.*" where all of a layer is blended or joined, and
    "<layer>.map" for a map in place of the removed layers from there on."""
    if not patch:
        return []
    changed = {f"{layer}.{role}" for layer, role in patch.updates} | {
        f"{layer}.*" for layer in (*patch.blends, *patch.joins)
    }
    return sorted(changed | {f"{start}.map" for start in patch.maps})


def trained_modules(patch: Patch | None, layers: str) -> list[str]:
    """What recovery has trained: decoder layers (of the path `layers`, by original number), and the other modules."""
    found = set()
    for name in patch.trained if patch else ():
        inside = name.removeprefix(f"{layers}.")
        found.add(name.rpartition(".")[0] if inside == name else f"{layers}.{inside.partition('.')[0]}")
    return sorted(found, key=lambda name: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name)])


def pruning_record(
    plan: Plan, patch: Patch | None, key: str | None, base_model: str | None, before: Any = None
) -> dict[str, Any]:
    """The record of a checkpoint that `plan` and `patch` make.

    Args:
        plan: which layers go.
        patch: what is folded into kept weights.
        key: of the run that made them, if one did.
        base_model: hub id of the model that is pruned, if it has one.
        before: the record of that model, if it was pruned before; anything else is left out, with a warning.
    """
    record: dict[str, Any] = {**json.loads(plan.to_json()), "compensated": changed_writers(patch), "key": key}
    history = _history(before, plan.n_layers)
    base_model = (history[0].get("base_model") if history else None) or base_model
    if base_model:
        record["base_model"] = base_model
    if history:
        record["history"] = history
        n_layers, removed = original_layers(record)
        record["original"] = {"n_layers": n_layers, "removed": removed}
    return record


def converted_model(origin: Any) -> str | None:
    """Hub id of what a checkpoint was converted from, by its record; None without one, and if it is no such record."""
    base_model = origin.get("base_model") if isinstance(origin, dict) else None
    return base_model if isinstance(base_model, str) and HUB_ID.fullmatch(base_model) else None


def original_layers(record: dict[str, Any]) -> tuple[int, list[int]]:
    """Depth of the first model, and which of its layers are gone after all steps of a record."""
    steps = [*record.get("history", ()), record]
    kept = list(range(steps[0]["n_layers"]))
    for step in steps:
        kept = [number for i, number in enumerate(kept) if i not in step["removed"]]
    return steps[0]["n_layers"], sorted(set(range(steps[0]["n_layers"])) - set(kept))


def _history(before: Any, n_layers: int) -> list[dict[str, Any]]:
    """All earlier steps, oldest first, each a record without a history of its own; empty if there are none."""
    if before is None:
        return []
    try:
        steps = [*before.get("history", ()), {k: v for k, v in before.items() if k not in ("history", "original")}]
        depth = None
        for step in steps:
            plan = Plan(step["n_layers"], tuple(step["removed"]))
            if depth not in (None, plan.n_layers):
                raise SvlError(f"it goes on with {plan.n_layers} layers after {depth}")
            depth = len(plan.kept)
        if depth != n_layers:
            raise SvlError(f"it leaves {depth} layers, but there are {n_layers}")
    except (SvlError, KeyError, TypeError, AttributeError, ValueError) as error:
        log.warning("  the config's record of an earlier pruning is left out, since it does not fit: %s", error)
        return []
    return steps
