"""Stages `recover` and `overlap`: a little training after pruning, and whether its pictures are those of benchmarks."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import Plan
from svl.processes import process_count, process_rank
from svl.run.early_checks import check_recovery
from svl.run.keys import identity_without, stage_code
from svl.run.parallel import in_scratch
from svl.run.stages import make_stage
from svl.run.variants import PATCH, TRAINED, ModelVariant, content_of
from svl.text.progress import progress_by_share

if TYPE_CHECKING:
    from svl.run.setup import RunSetup
    from svl.store.artifacts import Entry

log = logging.getLogger(__name__)


def train(setup: RunSetup, plan: Plan, patch: Entry | None) -> Entry | None:
    """Train what is left of the model, patched; None if no training is asked for, or nothing is removed.

    A run that is killed in it goes on from its last checkpoint.
    """
    if setup.recovers and plan.is_empty:
        log.info("  recover       nothing is removed, so nothing is trained")
    if not setup.recovers or plan.is_empty:
        return None
    samples, recovery, inputs = setup.training_samples, setup.recovery, training_inputs(setup, plan, patch)

    def build(folder: Path) -> dict[str, Any]:
        from svl.pruning import patch_file
        from svl.recovery import training

        before, kept = ModelVariant(setup, plan, patch).read_patch(), setup.store.unfinished("recover", inputs)
        with progress_by_share("recover") as show:

            def report(spent: Any, share: float) -> None:
                show(share, f"step {spent.steps}, loss {spent.curve[-1]['loss']:.4f}")

            found = training.recover(setup.dense, plan, before, samples, recovery, kept, report)
        if found.trained and process_rank() == 0:
            patch_file.save_trained(found.trained, folder / TRAINED)
        spent = dataclasses.asdict(found.spent)
        device, count = setup.dense.device_facts(recovery.batch_size), process_count()
        device |= {"processes": count} if count > 1 else {}
        return {**spent, "parameters": found.parameters, "examples": len(samples), "device": device}

    return make_stage(setup, "recover", inputs, build, help=in_scratch(build))


def training_inputs(setup: RunSetup, plan: Plan, patch: Entry | None) -> dict[str, Any]:
    """What a training depends on."""
    samples, recovery = setup.training_samples, setup.recovery
    inputs: dict[str, Any] = {
        "model": setup.model,
        "code": stage_code("recover"),
        "removed": plan.removed,
        "weights": content_of(patch, PATCH),
        "examples": [samples.fingerprint, samples.answers],
        "recovery": identity_without(recovery, recovery.unrelated),
    }
    if plan.sublayers:
        inputs["sublayers"] = plan.sublayers
    return inputs | {name: value for name in recovery.reads_of_plan if (value := plan.provenance.get(name))}


def describe_training(spent: dict[str, Any]) -> str:
    """What the log tells of a training, by what its stage gave."""
    counts = f"{spent['steps']} steps, {spent['samples']} samples, {spent['tokens']} tokens"
    return f"trained {spent['parameters'] / 1e6:.3g} M parameters: {counts} in {spent['seconds']:.0f} s"


def compare_pictures(setup: RunSetup, plan: Plan) -> Entry | None:
    """Find pictures of benchmarks among those that recovery trains on; None if it trains on none."""
    if not setup.recovers or plan.is_empty or not any(s.images for s in setup.training_samples):
        return None

    def build(folder: Path) -> dict[str, Any]:
        from svl.evaluation.picture_overlap import picture_overlap

        check_recovery(setup, plan)
        return picture_overlap(setup.training_samples, setup.tasks)

    inputs = {
        "examples": setup.training_samples.fingerprint,
        "benchmarks": setup.task_fingerprints,
        "limits": {task: options.limit for task, options in setup.tasks.items()},
        "code": stage_code("overlap"),
    }
    entry = make_stage(setup, "overlap", inputs, build)
    shared, rows = entry.output["shared"], entry.output["rows"]
    if shared:
        first = f"the first {len(rows)} in rows" if shared > len(rows) else "rows"
        log.warning("  recovery.data: %d samples have a picture of a benchmark, %s %s", shared, first, rows)
    return entry
