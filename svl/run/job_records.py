"""What the jobs of a sweep leave for its end: one small file each, in a hidden folder of the sweep's output folder.

The folder is emptied when the sweep starts, so that nothing of an earlier start in the same output folder is read; the
output folders of jobs themselves may be anywhere, and hold anything.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svl.store.files import write_text_whole
from svl.text.redaction import redact_text

FOLDER = ".jobs"


@dataclass(frozen=True)
class JobRecord:
    """How a job ended.

    Attributes:
        number: its number in the sweep, from 0.
        folder: its output folder.
        failure: why it failed, in one line; None if it did not.
        facts: of the result of a finished job, what tells it from others.
        ratio: of a finished job.
        work: seconds that it took by itself and in stages that it shares with others; None if it computed nothing.
    """

    number: int
    folder: str
    failure: str | None = None
    facts: dict[str, Any] | None = None
    ratio: float | None = None
    work: tuple[float, float] | None = None


def clear_records(sweep: Path) -> None:
    """Forget the jobs of an earlier start in the same folder."""
    shutil.rmtree(sweep / FOLDER, ignore_errors=True)


def record_failure(sweep: Path, number: int, folder: Path, reason: str) -> None:
    """Note that a job failed."""
    _write(sweep, JobRecord(number, str(folder), failure=redact_text(" ".join(reason.split()))))


def record_result(
    sweep: Path, number: int, folder: Path, result: dict[str, Any], work: tuple[float, float] | None = None
) -> None:
    """Note that a job finished; `work` as in JobRecord."""
    names = ("model", "strategy", "selector", "compensation", "recovery", "seed", "n_remove", "settings")
    facts = {name: result[name] for name in names} | {"n_layers": result["plan"]["n_layers"]}
    _write(sweep, JobRecord(number, str(folder), facts=facts, ratio=result["ratio"], work=work))


def _write(sweep: Path, record: JobRecord) -> None:
    (sweep / FOLDER).mkdir(parents=True, exist_ok=True)
    write_text_whole(sweep / FOLDER / f"{record.number}.json", json.dumps(asdict(record)))


def read_records(sweep: Path) -> list[JobRecord]:
    """The jobs that have ended since the sweep started, in their order."""
    files = (sweep / FOLDER).glob("*.json")
    records = [JobRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(records, key=lambda record: record.number)


def describe_failures(sweep: Path, count: int | None) -> str | None:
    """The jobs that failed, and those of `count` that did not end, in some lines; None if there is none."""
    records = read_records(sweep)
    failed = [record for record in records if record.failure]
    ended = {record.number for record in records}
    missing = [str(number) for number in range(count or 0) if number not in ended]
    if not failed and not missing:
        return None
    of = f" of {count}" if count else ""
    lines = [f"{len(failed) + len(missing)}{of} jobs failed (each folder has failed.txt and run.log):"]
    lines += [f"  {record.folder}: {record.failure}" for record in failed]
    if missing:
        lines.append(f"  jobs {', '.join(missing)} did not end: killed, or not started")
    return "\n".join(lines)


def equal_ratios(sweep: Path) -> list[str]:
    """Ratios of a sweep that come to the same layers: a line for each group of jobs that differ in nothing else."""
    groups: dict[str, list[JobRecord]] = defaultdict(list)
    for record in read_records(sweep):
        if record.facts:
            groups[json.dumps(record.facts, sort_keys=True)].append(record)
    lines = set()
    for same in groups.values():
        ratios = sorted({record.ratio for record in same if record.ratio is not None})
        facts = same[0].facts or {}
        if len(ratios) > 1:
            removed = f"the same {facts['n_remove']} of {facts['n_layers']} layers of {facts['model']}"
            listing = ", ".join(f"{ratio:g}" for ratio in ratios)
            lines.add(f"ratios {listing} are {removed}, so they were evaluated once")
    return sorted(lines)
