"""The model card of an exported checkpoint: what was done, on what, with which result, in terms that the Hub reads.

The metadata are huggingface_hub's, which checks them; the text is ours. What comes from outside (names, settings, the
source's own card) passes `for_markdown`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from svl.checkpoints.pruning_record import original_layers
from svl.core.plan import Plan
from svl.data.card_metadata import read_metadata
from svl.text.escaping import for_markdown

log = logging.getLogger(__name__)

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the source's own card
TAGS = ["short-lvlm", "layer-pruning"]


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells.

    Attributes:
        plan: what was removed in this step.
        record: of this and earlier steps, as in config.json (see pruning_record).
        title: of the new model.
        name: of the model that was pruned.
        auto: transformers class that loads it (AutoModelFor...).
        needs_svl: whether the model's code is in svl, not in transformers.
        source: folder of the checkpoint that was pruned, whose card says under which licence it may be used.
        result: of the run that made the plan, as in its result.json.
    """

    plan: Plan
    record: dict[str, Any]
    title: str
    name: str
    auto: str
    needs_svl: bool
    source: Path
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def reads_images(self) -> bool:
        """Whether a processor belongs to the model, not only a tokenizer."""
        names = ("processor_config.json", "preprocessor_config.json")
        return self.needs_svl or any((self.source / name).is_file() for name in names)

    @property
    def task(self) -> str:
        """The task as the Hub calls it."""
        return "image-text-to-text" if self.auto.endswith("ImageTextToText") else "text-generation"


def write_model_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into `folder`.

    Raises:
        SvlError: if the source's card has more metadata than any model's.
    """
    body = "\n\n".join(
        [
            f"# {for_markdown(facts.name)}, {len(facts.plan.kept)} of {facts.plan.n_layers} decoder layers",
            _summary(facts),
            _usage(facts),
            *_history(facts.record),
            *_recipe(facts),
            *_scores(facts.result),
            f"## Plan\n\n```json\n{facts.plan.to_json()}```",
        ]
    )
    ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n").save(folder / "README.md")


# ------------------------------------------------------------------------------------------------- metadata


def read_card_metadata(readme: Path) -> dict[str, Any]:
    """The metadata of a model card; empty if there are none, or they cannot be read (which is logged).

    Raises:
        SvlError: if they are longer than any model's.
    """
    try:
        return read_metadata(readme)
    except (OSError, ValueError) as error:
        log.warning("  the metadata of '%s' cannot be read, so its licence is not carried over: %s", readme, error)
        return {}


def _metadata(facts: CardFacts) -> ModelCardData:
    fields: dict[str, Any] = {"pipeline_tag": facts.task}
    for name, value in read_card_metadata(facts.source / "README.md").items():
        if name in INHERITED and _is_text(value):
            fields[name] = value
    if base_model := facts.record.get("base_model"):
        fields |= {"base_model": base_model, "base_model_relation": "finetune"}  # the closest of the Hub's relations
    results = _eval_results(facts)
    return ModelCardData(
        library_name="transformers",
        tags=TAGS,
        model_name=facts.title if results else None,
        eval_results=results or None,
        **fields,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """The scores as the Hub's `model-index` has them; undefined ones are none."""
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=metric,
            metric_value=value["value"],
        )
        for task, metric, _, value in _main_metrics(facts.result)
        if value["value"] is not None
    ]


# ----------------------------------------------------------------------------------------------------- text


def _summary(facts: CardFacts) -> str:
    removed = f"Layers {list(facts.plan.removed)} (0-based) of {for_markdown(facts.name)} were removed"
    if not facts.record.get("trained"):
        removed += " without training"
    if facts.plan.sublayers:
        parts = ", ".join(f"{layer}.{role}" for layer, role in facts.plan.sublayers)
        removed += f", and of others {parts} (layer.projection), whose weights are zeros here and save nothing,"
    if changed := facts.record["compensated"]:
        removed += f", and {', '.join(changed)} (layer.projection) were changed to make up for them,"
    told = f"{removed} by [svl](https://arxiv.org/abs/2507.23362), an implementation of Short-LVLM and its baselines."
    if trained := facts.record.get("trained"):
        told += f" Of what is left, {len(trained)} modules were trained afterwards; config.json lists them."
    return told


def _usage(facts: CardFacts) -> str:
    reader = "AutoProcessor" if facts.reads_images else "AutoTokenizer"
    needs, code = "It loads with plain transformers:", ""
    if facts.needs_svl:
        needs = "It needs svl, which has the model's code, beside transformers:"
        code = "import svl.models.ports  # makes the model known to transformers\n"
    code += f"from transformers import {facts.auto}, {reader}\n\nmodel = {facts.auto}.from_pretrained(PATH)\n"
    return f"{needs}\n\n```python\n{code}processor = {reader}.from_pretrained(PATH)\n```"


def _history(record: dict[str, Any]) -> list[str]:
    """All steps, of a model that was pruned more than once."""
    if "history" not in record:
        return []
    n_layers, removed = original_layers(record)
    rows = ["| step | of layers | removed | changed | strategy |", "|---:|---:|---|---|---|"]
    for number, step in enumerate([*record["history"], record], 1):
        changed = ", ".join(step.get("compensated") or ()) or "nothing"
        changed += "; trained" if step.get("trained") else ""
        cells = (number, step["n_layers"], list(step["removed"]), changed, step.get("strategy", ""))
        rows.append(f"| {' | '.join(map(for_markdown, cells))} |")
    base = f" of {for_markdown(record['base_model'])}" if "base_model" in record else ""
    total = f"Together these are layers {removed} of the {n_layers}{base}."
    return ["## History\n\n" + "\n".join(rows) + f"\n\nNumbers are those of the model of each step. {total}"]


def _recipe(facts: CardFacts) -> list[str]:
    """How the plan was made, as far as it is known."""
    result, provenance = facts.result, facts.plan.provenance
    settings = result.get("settings", {})
    rows: list[tuple[str, str]] = []
    for part in ("strategy", "selector", "compensation", "recovery"):
        if chosen := result.get(part, provenance.get(part)):
            options = {name: value for name, value in settings.get(part, {}).items() if name != "_target_"}
            listing = ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())
            rows.append((part, f"{chosen} ({listing})" if listing else str(chosen)))
    if spent := result.get("training"):
        told = f"{spent['steps']} steps, {spent['samples']} samples, {spent['tokens']} tokens, {spent['seconds']:.0f} s"
        rows.append(("training", told))
    if calibration := settings.get("calibration"):
        samples = calibration["samples"] or "all"
        rows.append(("calibration", f"{calibration['file']}, {samples} samples, seed {calibration['seed']}"))
    if isinstance(ratio := provenance.get("ratio"), int | float):
        rows.append(("layers removed", f"{100 * ratio:.4g} %"))
    if versions := result.get("versions"):
        rows.append(("made with", ", ".join(f"{name} {versions[name]}" for name in ("svl", "torch", "transformers"))))
    lines = [f"| {name} | {for_markdown(text)} |" for name, text in rows]
    return ["## Recipe\n\n| | |\n|---|---|\n" + "\n".join(lines)] if lines else []


def _scores(result: dict[str, Any]) -> list[str]:
    """Main metrics beside the dense model's."""
    if not result.get("scores"):
        return []
    rows = ["| task | metric | n | this model | dense |", "|---|---|---:|---:|---:|"]
    for task, metric, score, value in _main_metrics(result):
        error = "" if value["stderr"] is None else f" ± {value['stderr']:.4g}"
        cells = (task, metric, score["n"], f"{_number(value['value'])}{error}", _number(value["dense"]))
        rows.append(f"| {' | '.join(map(for_markdown, cells))} |")
    limit = result.get("limit")
    note = f"\n\nOn the first {limit} samples of each task only." if limit else ""
    return ["## Results\n\n" + "\n".join(rows) + "\n\n± is the standard error." + note]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def _main_metrics(result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Task, main metric, the task's score and that metric's value, for every task."""
    scores = (result.get("scores") or {}).items()
    return [(task, score["metric"], score, score["metrics"][score["metric"]]) for task, score in scores]
