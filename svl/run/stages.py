"""How a stage is made: in the store, in step with the other processes of a run, timed and logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from svl.core.errors import out_of_memory
from svl.run.parallel import Help, make_in_step
from svl.store.artifacts import Entry

if TYPE_CHECKING:
    from svl.run.setup import RunSetup

log = logging.getLogger(__name__)

# What to turn down when memory runs out in a stage; calibration and evaluation know better where it did.
LESS_MEMORY = {
    "stats": "lower calibration.batch_size, or set model.offload=true",
    "texts": "lower calibration.generated_tokens, or set model.dtype=bfloat16",
    "probe": "calibrate on fewer or shorter samples, or set model.dtype=bfloat16",
    "plan": "calibrate on fewer or shorter samples, or set model.dtype=bfloat16",
    "check": "set model.dtype=bfloat16, or model.device=cpu",
    "patch": "lower calibration.batch_size, set model.device=cpu, or choose another compensation",
    "score": "lower benchmark.batch_size, or set model.dtype=bfloat16",
    "efficiency": "lower efficiency.batch_size or efficiency.new_tokens",
}


def make_stage(
    setup: RunSetup,
    stage: str,
    inputs: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    *,
    help: Help | None = None,
    alone: bool = False,
) -> Entry:
    """`store.make`, with the seconds that the stage itself took as its output `work`.

    Under torchrun all processes call it, and the first one builds while the others `help`; with `alone` only this
    process calls it.
    """

    def timed(folder: Path) -> dict[str, Any]:
        began, loading = time.perf_counter(), setup.seconds_loading
        with out_of_memory(f"stage '{stage}'", LESS_MEMORY[stage]):
            output = build(folder)
        seconds = time.perf_counter() - began - (setup.seconds_loading - loading)
        return {**output, "work": round(seconds, 3)}

    if alone:
        return setup.store.make(stage, inputs, timed)
    return make_in_step(setup.store, stage, inputs, timed, help)


def log_stage(stage: str, entry: Entry, message: str = "") -> Entry:
    """Log a finished stage; gives its entry."""
    how = "stored" if entry.reused else f"{entry.output['work']:.1f} s"
    log.info("  %-10s %8s  %s", stage, how, message)
    return entry


def log_outcome(result: dict[str, Any], seconds: float) -> None:
    """Log what a run came to, and what its comparison with the dense model suffers from."""
    for task, score in result["scores"].items():
        if note := (score["change"] or {}).get("note"):
            log.warning("  %s: %s", task, note)
    if result["retained"]:
        log.info("  retained %.1f %% of dense, %.1f s", 100 * result["retained"]["value"], seconds)


def show_progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Progress over batches, with the time left."""
    return tqdm(items, desc=f"  {what}", total=total, leave=False, dynamic_ncols=True, disable=None)
