"""Scores of a sweep that are made together, before its first job starts: `together` above 1.

The plans of all jobs are made, and those of one model are evaluated together (see svl.evaluation.shared_prefill, and
lock_step for accelerators); the jobs then find their scores in the store.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from svl.core import SvlError
from svl.processes import process_count
from svl.run import hydra_internals
from svl.run.pipeline import Run
from svl.run.variants import ModelVariant

if TYPE_CHECKING:
    import torch

    from svl.models.lvlm import Lvlm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MissingScore:
    """A score that a job needs and the store lacks.

    Attributes:
        variant: the model.
        task: what it is scored on.
        inputs: of the score's key.
    """

    variant: ModelVariant
    task: str
    inputs: dict[str, Any]

    @property
    def family(self) -> str:
        """Equal for scores that differ in the plan only."""
        shared = {name: value for name, value in self.inputs.items() if name not in ("removed", "sublayers", "weights")}
        return json.dumps(shared, sort_keys=True)


def make_shared_scores(config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Put the scores of all jobs into the store that can be had together. What fails is logged, and left to the job.

    Args:
        config: of the sweep, with its `hydra` part.
        jobs: the overrides of each.
    """
    if process_count() > 1:
        reason = "is for single processes; under torchrun, plans are evaluated one by one"
        log.warning("together=%d %s", config.together, reason)
        return
    missing: list[MissingScore] = []
    for number, overrides in enumerate(jobs):
        log.info("[%d/%d] plan: %s", number + 1, len(jobs), " ".join(overrides))
        try:
            cfg = hydra_internals.without_hydra(hydra_internals.compose_job(config, overrides))
            missing += missing_scores(Run(cfg, Path(os.environ["SVL_SWEEP"])))
        except Exception as error:  # noqa: BLE001 (the job itself will fail in the same way, and be reported)
            log.warning("  cannot be planned: %s", error)
    for family in score_families(missing, config.together):
        try:
            evaluate_family(family)
        except SvlError as error:
            log.warning("  cannot be evaluated together, so each is by itself: %s", error)


def missing_scores(run: Run) -> list[MissingScore]:
    """Make the plan of a run and its patch; the scores it lacks, dense ones included.

    What pruned models are combined with makes them too different to share anything; what recovery trains may lie before
    the first layer, so that nothing behind it is shared. Of such runs nothing is made here: their jobs may run side by
    side. The run's model is released, so that a sweep over models holds one of them at a time.
    """
    setup = run.setup
    if setup.combined or setup.recovers:
        return []
    stages, missing = run.prepare(), []
    for variant in (stages.dense_model, stages.pruned_model):
        for task in setup.tasks:
            if setup.uses_vllm or not variant.answers(task):
                continue
            inputs = variant.score_inputs(task)
            if setup.store.get("score", inputs) is None:
                missing.append(MissingScore(variant, task, inputs))
    setup.release_model()
    run.log.flush()
    return missing


def score_families(missing: Sequence[MissingScore], most: int) -> Iterator[list[MissingScore]]:
    """Different scores of one family, at most so many at once; none is alone."""
    families: dict[str, dict[str, MissingScore]] = defaultdict(dict)
    for score in missing:
        families[score.family].setdefault(json.dumps(score.inputs, sort_keys=True), score)
    for members in families.values():
        # Deep plans with deep ones: neighbours have the longest beginning in common.
        family = sorted(members.values(), key=_first_difference, reverse=True)
        for start in range(0, len(family), most):
            part = family[start : start + most]
            if len(part) > 1:
                yield part


def _first_difference(score: MissingScore) -> int:
    """The first layer where a model differs from the dense one."""
    plan = score.variant.plan
    return min([*plan.removed, *(layer for layer, _ in plan.sublayers)], default=plan.n_layers)


def evaluate_family(family: Sequence[MissingScore]) -> None:
    """Score one family and store every score under its own key.

    Raises:
        SvlError: if its models cannot be evaluated together.
    """
    setup, task = family[0].variant.setup, family[0].task
    log.info("%s: %d plans together", task, len(family))
    with setup.store.scratch("together") as root:
        folders = [root / str(number) for number in range(len(family))]
        for folder in folders:
            folder.mkdir(parents=True)
        try:
            variants = [ModelVariant(setup, s.variant.plan, s.variant.stored_patch) for s in family]  # of one model
            found = evaluate_models(setup.dense, variants, task, folders)
            for score, variant, folder, scores in zip(family, variants, folders, found, strict=True):
                output = {**scores, "params": variant.lvlm.parameters(), "work": scores["seconds"]}
                store_score(score, folder, output)
        finally:
            setup.release_model()


def evaluate_models(
    dense: Lvlm, variants: Sequence[ModelVariant], task: str, folders: Sequence[Path]
) -> list[dict[str, Any]]:
    """The scores of variants of one model, which answer together; in lock-step where that pays and can be done.

    Raises:
        SvlError: if they cannot be evaluated together.
    """
    from svl.evaluation.evaluate import evaluate_together
    from svl.evaluation.lock_step import LockStep

    models, options = [v.lvlm for v in variants], variants[0].setup.tasks[task]
    if waits_for_weights(dense.device):
        try:
            lock_step = LockStep(dense, models, [v.plan for v in variants])
            return evaluate_together(models, task, options, folders, lock_step)
        except SvlError as error:
            log.warning("  not in lock-step, so they share the prompt only: %s", error)
    return evaluate_together(models, task, options, folders)


def waits_for_weights(device: torch.device) -> bool:
    """Whether a model decodes there as fast as its weights are read, so that reading them once for many rows pays."""
    return device.type != "cpu"


def store_score(score: MissingScore, made: Path, output: dict[str, Any]) -> None:
    """Move a finished score from the folder `made` into the store."""

    def build(folder: Path) -> dict[str, Any]:
        for file in made.iterdir():
            file.rename(folder / file.name)
        return output

    score.variant.setup.store.make("score", score.inputs, build)
