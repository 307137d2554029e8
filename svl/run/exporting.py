"""Pruned checkpoints of a run: the one that was asked for, and the temporary one that vLLM reads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.checkpoints import export, new_checkpoint
from svl.config import plain_values
from svl.core.errors import SvlError, out_of_memory
from svl.processes import process_rank
from svl.run.keys import method_identity
from svl.text.progress import still_working

if TYPE_CHECKING:
    from svl.run.setup import RunSetup
    from svl.run.variants import ModelVariant
    from svl.store.artifacts import Entry

log = logging.getLogger(__name__)


@contextmanager
def export_reserved(setup: RunSetup) -> Iterator[None]:
    """Within the block, which is the whole run, no other process can export to where this one will.

    Raises:
        SvlError: if the path is taken, or for whatever else an export will be refused for as far as that is known.
    """
    path = setup.cfg.export.path
    if process_rank() == 0 and setup.uses_vllm and setup.tasks:  # which reads exports
        new_checkpoint.check_source(setup.checkpoint, setup.options, 0, setup.compensates)
    if not path or process_rank() > 0:
        yield
        return
    with export.reserve_export(path):
        key = export.exporting_run(path)
        if key is None:
            export.check_exportable(
                setup.checkpoint,
                path,
                setup.options,
                n_remove=setup.cfg.n_remove or 0,
                compensates=setup.compensates,
            )
        elif not may_be_this_run(setup, key):
            raise SvlError(f"export.path '{path}' exists already, from run {key}; it is never overwritten")
        yield


def may_be_this_run(setup: RunSetup, key: str) -> bool:
    """Whether a run was asked for what this one is, as far as the store tells: then this is the same run again."""
    run = setup.store.read(setup.store.root / "run" / key, warn=False)
    if run is None:
        return True
    ratio = setup.cfg.ratio if setup.cfg.n_remove is None else None
    asked = {"ratio": ratio, "n_remove": setup.cfg.n_remove, "strategy": method_identity(setup.strategy)}
    named = {"name": setup.cfg.name, "seed": setup.cfg.seed, "settings": setup.distinguishing_settings()}
    named["model_fingerprint"] = setup.fingerprint
    plans = [setup.store.read(setup.store.root / "plan" / plan, warn=False) for plan in run.output["keys"]["plan"]]
    asked, named = json.loads(json.dumps([asked, named]))  # as the store has them
    if not named.items() <= run.output.items() or run.output["scores"].keys() != setup.tasks.keys():
        return False
    return all(plan is None or asked.items() <= plan.manifest["inputs"].items() for plan in plans)


def export_run(setup: RunSetup, variant: ModelVariant, run: Entry) -> None:
    """Write the pruned checkpoint, if one is asked for and this run has not written it before."""
    path = setup.cfg.export.path
    if not path:
        return
    if export.exporting_run(path) != run.key:
        smaller = "choose a compensation that changes less at once, or free some memory"
        with out_of_memory("the export", smaller), still_working("exporting"):
            write_checkpoint(variant, path, run)
    log.info("  exported to %s", path)


def write_checkpoint(variant: ModelVariant, path: Path | str, run: Entry | None = None) -> Path:
    """Save what is left of the checkpoint as the new folder `path`, with what is known of its `run`."""
    setup = variant.setup
    record = export.ExportRecord(
        run.output if run else None, run.key if run else None, image_processor=setup.image_processor
    )
    return export.save(setup.checkpoint, variant.plan, path, variant.read_patch(), setup.options, record=record)


def load_in_vllm(variant: ModelVariant) -> Any:
    """The model in vLLM, which reads checkpoints: the dense one's own if nothing is changed, or a temporary export."""
    from svl.evaluation.vllm import vllm_answerer
    from svl.models.prompts import style_template

    setup = variant.setup
    options, template = plain_values(setup.cfg.evaluator.options), style_template(setup.prompt_style)
    batch_size = setup.cfg.benchmark.batch_size
    if variant.plan.is_empty and not setup.image_processor:
        return vllm_answerer(setup.checkpoint, batch_size, options, template)
    with setup.store.scratch("vllm") as folder:
        try:
            write_checkpoint(variant, folder)
            return vllm_answerer(str(folder), batch_size, options, template)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the weights are read
