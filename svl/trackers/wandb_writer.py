"""Writes a run of Weights & Biases to a folder: `python -m svl.trackers.wandb_writer < JSON` prints its path.

A process of its own, so that svl.trackers.wandb can end it, and W&B's service with it, when it hangs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.trackers.record import Record

if TYPE_CHECKING:
    import wandb

ROWS = 1000  # in a table
LONGEST_NAME, LONGEST_TAG = 128, 64  # W&B's limits: a longer name or tag is an error there


def write_run(record: Record, project: str, entity: str | None, tags: Sequence[str]) -> Path:
    """Write an offline run into the record's folder; the run's own folder in it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or W&B reports its crashes to a server of its own
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # process-wide: settings of a run come too late for some messages
    labels = dict.fromkeys(tag[:LONGEST_TAG] for tag in (*record.tags, *tags) if tag)
    run = wandb.init(
        project=project,
        entity=entity,
        mode="offline",
        dir=str(record.folder),
        id=record.key,
        group=record.group[:LONGEST_NAME],
        name=record.name[:LONGEST_NAME],
        tags=list(labels),
        job_type=record.kind,
        config=dict(record.config),
        settings=wandb.Settings(
            silent=True,
            console="off",  # run.log has it
            x_disable_stats=True,  # a mirror is made when the work is done; `seconds/*` and `cost/*` tell of that
            save_code=False,
        ),
    )
    folder = Path(run.settings.sync_dir)
    try:
        write_wandb_run(run, record)
    finally:
        run.finish(exit_code=int(record.error is not None))
    return folder


def write_wandb_run(run: wandb.Run, record: Record) -> None:
    """Everything that a record holds."""
    import wandb

    run.summary.update({**record.summary(), **({"error": record.error} if record.error else {})})
    run.define_metric("layer", summary="none")
    run.define_metric("layers/*", step_metric="layer", summary="none")
    for point in record.layers():
        run.log({name if name == "layer" else f"layers/{name}": value for name, value in point.items()})
    if record.training:
        run.define_metric("recover/step", summary="none")
        run.define_metric("recover/*", step_metric="recover/step", summary="none")
    for moment in record.training:
        run.log({f"recover/{name}": value for name, value in moment.items()})
    for title, path in record.figures.items():
        run.log({f"figures/{title}": wandb.Image(str(path))})
    for kind, files in record.files.items():
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        for file in files:
            # A copy in the run's folder: one of W&B's would be gone before an offline run is uploaded, and the file
            # itself would be gone afterwards, because uploading deletes it.
            copied = shutil.copy(file, run.dir)
            artifact.add_file(copied, policy="immutable", skip_cache=True)
        run.log_artifact(artifact)
    # Last, because W&B stages tables in the home directory, which on clusters may be read-only.
    for title, rows in (("layers", record.layers()), ("flips", record.flips[:ROWS])):
        if rows:
            run.log({title: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})


def record_from_json(body: Mapping[str, Any]) -> Record:
    """A record whose paths have become text."""
    figures = {title: Path(path) for title, path in body["figures"].items()}
    files = {kind: [Path(path) for path in paths] for kind, paths in body["files"].items()}
    return Record(**{**body, "folder": Path(body["folder"]), "figures": figures, "files": files})


if __name__ == "__main__":
    given = json.load(sys.stdin)
    try:
        print(write_run(record_from_json(given.pop("record")), **given))
    # Deliberately broad: the reason is the last line of what is printed, whatever it is.
    except Exception as problem:  # noqa: BLE001
        sys.exit(" ".join(str(problem).split()) or type(problem).__name__)
