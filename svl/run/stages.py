"""How a stage is made: in the store, in step with the other processes of a run, timed and logged."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core.errors import out_of_memory
from svl.run.parallel import Help, make_in_step
from svl.store.artifacts import Entry

if TYPE_CHECKING:
    from svl.run.setup import RunSetup

log = logging.getLogger(__name__)
LINE = "  %-10s %8s  %s"  # stage, seconds, what came of it

# What to turn down when memory runs out in a stage; calibration and evaluation know better where it did.
LESS_MEMORY = {
    "stats": "lower calibration.batch_size, or set model.offload=true",
    "texts": "lower calibration.generated_tokens, or set model.dtype=bfloat16",
    "probe": "calibrate on fewer or shorter samples, or set model.dtype=bfloat16",
    "plan": "calibrate on fewer or shorter samples, or set model.dtype=bfloat16",
    "check": "set model.dtype=bfloat16, or model.device=cpu",
    "patch": "lower calibration.batch_size, set model.device=cpu, or choose another compensation",
    "recover": "lower recovery.batch_size, or set recovery.gradient_checkpointing=true or model.dtype=bfloat16",
    "overlap": "leave the benchmark out",
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
        setup.log.flush()
        began, loading = time.perf_counter(), setup.seconds_loading
        with out_of_memory(f"stage '{stage}'", LESS_MEMORY[stage]):
            output = build(folder)
        seconds = time.perf_counter() - began - (setup.seconds_loading - loading)
        return {**output, "work": round(seconds, 3)}

    if alone:
        return setup.store.make(stage, inputs, timed)
    return make_in_step(setup.store, stage, inputs, timed, help)


class StageLog:
    """What a run tells of its stages: a line for each that was computed, and one for all between them that were stored.

    Attributes:
        shared: seconds of work that other jobs of a sweep need not do again, such as calibration.
        computed: whether anything was computed that is of this run alone.
    """

    def __init__(self) -> None:
        self.shared = 0.0
        self.computed = False
        self._stored: list[tuple[str, str]] = []

    def stage(self, stage: str, entry: Entry, message: str = "", *, brief: str = "", shared: bool = False) -> Entry:
        """Tell of a finished stage; gives its entry.

        Args:
            stage: what it is called.
            entry: its result.
            message: what is told of it if it was computed.
            brief: what is told of it if it was stored.
            shared: whether other jobs of a sweep find it stored, whatever their method and ratio.
        """
        if entry.reused:
            self._stored.append((stage, brief))
            return entry
        log.info(LINE, stage, f"{entry.output['work']:.1f} s", message)
        self.shared += entry.output["work"] if shared else 0
        self.computed |= not shared
        return entry

    def flush(self) -> None:
        """Tell of stored stages what was not told yet."""
        if not self._stored:
            return
        counts = Counter(stage for stage, _ in self._stored)
        names = ", ".join(f"{n} x {stage}" if n > 1 else stage for stage, n in counts.items())
        told = "; ".join(brief for _, brief in self._stored if brief)
        log.info(LINE, "stored", "", f"{names}: {told}" if told else names)
        self._stored.clear()

    def outcome(self, result: dict[str, Any], seconds: float) -> None:
        """Tell what a run came to, and what its comparison with the dense model suffers from."""
        self.flush()
        for task, score in result["scores"].items():
            if note := (score["change"] or {}).get("note"):
                log.warning("  %s: %s", task, note)
        if note := result.get("average_note"):
            log.warning("  no average: %s", note)
        if result["retained"]:
            log.info("  retained %.1f %% of dense, %.1f s", 100 * result["retained"]["value"], seconds)
