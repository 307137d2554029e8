"""The model card of an exported checkpoint: what was done, on what, with which result, in terms that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from svl.core import Plan

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the source's own card
TAGS = ["short-lvlm", "layer-pruning"]


def metadata(readme: Path) -> dict[str, Any]:
    """The YAML block at the top of a model card; empty if there is none."""
    try:
        text = readme.read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def write(
    folder: Path,
    plan: Plan,
    *,
    title: str,
    name: str,
    auto: str,
    source: Path,
    base: str | None = None,
    compensated: Sequence[str] = (),
    result: dict[str, Any] | None = None,
    port: bool = False,
) -> None:
    """Write README.md into `folder`.

    Args:
        folder: of the exported checkpoint.
        plan: what was removed.
        title: of the new model.
        name: of the dense model.
        auto: transformers class that loads it (AutoModelFor...).
        source: folder of the dense checkpoint, whose card says under which licence it may be used.
        base: hub id of the dense model, if it has one.
        compensated: weights that were changed, as "<original layer>.<writer>".
        result: of the run that made the plan, as in its result.json.
        port: whether the model's code is in svl, not in transformers.
    """
    result = result or {}
    inherited = metadata(source / "README.md")
    task = "image-text-to-text" if auto.endswith("ImageTextToText") else "text-generation"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": TAGS}
    front |= {field: inherited[field] for field in INHERITED if field in inherited}
    if base:
        front |= {"base_model": base, "base_model_relation": "finetune"}  # the closest of the Hub's relations
    if result.get("scores"):
        front["model-index"] = [{"name": title, "results": list(_results(result, task))}]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {name}, {len(plan.kept)} of {plan.n_layers} decoder layers",
        _summary(plan, name, compensated),
        _usage(auto, source, port),
        *_recipe(plan, result),
        *_scores(result),
        f"## Plan\n\n```json\n{plan.to_json()}```",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _summary(plan: Plan, name: str, compensated: Sequence[str]) -> str:
    removed = f"Layers {list(plan.removed)} (0-based) of `{name}` were removed without training"
    if compensated:
        removed += f", and {', '.join(compensated)} (layer.projection) were changed to make up for them,"
    return f"{removed} by [svl](https://arxiv.org/abs/2507.23362), an implementation of Short-LVLM and its baselines."


def _usage(auto: str, source: Path, port: bool) -> str:
    sees = port or any((source / f"{name}_config.json").is_file() for name in ("processor", "preprocessor"))
    reader = "AutoProcessor" if sees else "AutoTokenizer"
    needs = (
        "It needs svl, which has the model's code, beside transformers:"
        if port
        else "It loads with plain transformers:"
    )
    code = "import svl\n" if port else ""
    code += f"from transformers import {auto}, {reader}\n\nmodel = {auto}.from_pretrained(PATH)\n"
    return f"{needs}\n\n```python\n{code}processor = {reader}.from_pretrained(PATH)\n```"


def _recipe(plan: Plan, result: dict[str, Any]) -> list[str]:
    """How the plan was made, as far as it says."""
    settings = result.get("settings", {})
    lines = []
    for part in ("strategy", "selector", "compensation"):
        if chosen := result.get(part, plan.provenance.get(part)):
            options = {k: v for k, v in settings.get(part, {}).items() if k != "_target_"}
            lines.append(f"| {part} | {chosen}{_listing(options)} |")
    if calibration := settings.get("calibration"):
        samples = calibration["samples"] or "all"
        lines.append(f"| calibration | {calibration['file']}, {samples} samples, seed {calibration['seed']} |")
    if (ratio := plan.provenance.get("ratio")) is not None:
        lines.append(f"| layers removed | {100 * ratio:.4g} % |")
    if versions := result.get("versions"):
        lines.append(f"| made with | {', '.join(f'{k} {versions[k]}' for k in ('svl', 'torch', 'transformers'))} |")
    return ["## Recipe\n\n| | |\n|---|---|\n" + "\n".join(lines)] if lines else []


def _listing(options: dict[str, Any]) -> str:
    return f" ({', '.join(f'{k}={json.dumps(v)}' for k, v in options.items())})" if options else ""


def _scores(result: dict[str, Any]) -> list[str]:
    """Main metrics beside the dense model's."""
    if not result.get("scores"):
        return []
    rows = ["| task | metric | n | this model | dense |", "|---|---|---:|---:|---:|"]
    for task, metric, score, value in _main(result):
        error = "" if value["stderr"] is None else f" ± {value['stderr']:.4g}"
        rows.append(
            f"| {task} | {metric} | {score['n']} | {_number(value['value'])}{error} | {_number(value['dense'])} |"
        )
    limit = result.get("limit")
    note = f"\n\nOn the first {limit} samples of each task only." if limit else ""
    return ["## Results\n\n" + "\n".join(rows) + "\n\n± is the standard error." + note]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def _main(result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    return [(t, s["metric"], s, s["metrics"][s["metric"]]) for t, s in result["scores"].items()]


def _results(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The scores as the Hub's `model-index` has them."""
    return [
        {
            "task": {"type": kind},
            "dataset": {"name": task, "type": task},
            "metrics": [{"type": metric, "value": value["value"], "name": metric}],
        }
        for task, metric, _, value in _main(result)
        if value["value"] is not None
    ]
