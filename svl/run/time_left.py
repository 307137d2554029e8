"""How far a sweep is, told by its jobs: whichever launcher runs them, in whichever order, however many at once.

A job knows nothing of the others but what lies in the sweep's folder: here, which jobs there will be (written before
the first one starts) and which have started, and in svl.run.job_records how those that ended did. All processes of a
sweep see that folder, so this needs no environment variable to reach a node of a cluster.

What is left is judged by what is still to be computed. A job's work is its own (plan, compensation, evaluation of its
pruned model) or shared with the jobs on the same model and calibration (loading, statistics, evaluation of the dense
model), which only the first of them does. Jobs that found everything stored say nothing of those that will not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from svl.run.job_records import FOLDER, JobRecord, read_records
from svl.store.files import digest, write_text_whole
from svl.text.progress import in_time_units

JOBS = "jobs"  # files of FOLDER, which readers of records do not read: they have no ending
STARTED = "started"
SHARED = ("model", "calibration", "benchmark", "evaluator")  # groups; jobs that agree in them share stages


@dataclass(frozen=True)
class Progress:
    """Where a sweep is.

    Attributes:
        shares: for each of its jobs, what it shares stages by; None if jobs are decided on as the sweep goes.
        started: when each job that did began, by its number [seconds].
        ended: the records of those that ended.
    """

    shares: Sequence[str] | None
    started: Mapping[int, float]
    ended: Sequence[JobRecord]

    def seconds_left(self, now: float) -> float | None:
        """How long it will take from `now` on, at the pace so far; None if nothing tells."""
        computed = [record.work for record in self.ended if record.work is not None]
        if self.shares is None or not computed:
            return None
        own = fmean(own for own, _ in computed)
        once = fmean([shared for _, shared in computed if shared > 0] or [0.0])
        ended = {record.number for record in self.ended}
        running = {number: began for number, began in self.started.items() if number not in ended}
        seen = {self.shares[number] for number in self.started if number < len(self.shares)}
        waiting = [shared for number, shared in enumerate(self.shares) if number not in self.started]
        left = sum(max(0.0, own - (now - began)) for began in running.values())
        left += len(waiting) * own + len(set(waiting) - seen) * once
        return left / max(1, len(running))

    def place_of(self, number: int, now: float) -> str:
        """ "[3/12, about 40 s left] ": the place of a job; where others are still under way, how many have ended."""
        if self.shares is None:
            return f"[{number + 1}] "
        parts = [f"{number + 1}/{len(self.shares)}"]
        if len(self.ended) != number:
            parts.append(f"{len(self.ended)} done")
        if (left := self.seconds_left(now)) is not None:
            parts.append(f"about {in_time_units(left)} left")
        return f"[{', '.join(parts)}] "


def write_jobs(sweep: Path, shared: Sequence[Mapping[str, Any]]) -> None:
    """Note which jobs there will be: of each, the settings that tell whom it shares stages with."""
    (sweep / FOLDER).mkdir(parents=True, exist_ok=True)
    write_text_whole(sweep / FOLDER / JOBS, json.dumps([digest(settings) for settings in shared]))


def start_job(sweep: Path, number: int) -> str:
    """Note that a job starts; its place among the others, as text."""
    started = sweep / FOLDER / STARTED
    started.mkdir(parents=True, exist_ok=True)
    write_text_whole(started / str(number), json.dumps(time.time()))
    return read_progress(sweep).place_of(number, time.time())


def read_progress(sweep: Path) -> Progress:
    """Where the sweep of this folder is."""
    jobs = sweep / FOLDER / JOBS
    shares = json.loads(jobs.read_text(encoding="utf-8")) if jobs.exists() else None
    files = (sweep / FOLDER / STARTED).glob("[0-9]*")
    started = {int(file.name): float(json.loads(file.read_text(encoding="utf-8"))) for file in files}
    return Progress(shares, started, read_records(sweep))
