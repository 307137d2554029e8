"""Weights & Biases: one run for each result, its summary the row of the runs table.

A run is written to a folder without network. Offline, which is the default, that is all, and the command that uploads
it is printed; online, it is uploaded at once by a process that has so many seconds, because W&B's client would go on
trying for days when a server is lost. Runs have the key of the result as their id: mirrored twice, they are one there.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import one_of
from svl.record import Record

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)
MODES = ("offline", "online", "disabled")
PATIENCE = 120.0  # seconds that an upload may take
ROWS = 1000  # in a table


@dataclass(frozen=True)
class Wandb:
    """See the module.

    Attributes:
        project: name of the project.
        entity: user or team; None leaves the choice to W&B (the variable WANDB_ENTITY, or the account's default).
        mode: offline, online or disabled; the environment variable WANDB_MODE, where set, goes first.
        tags: labels besides svl's own.
    """

    project: str = "short-lvlm"
    entity: str | None = None
    mode: str = "offline"
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("tracker.mode", self.mode, MODES)

    def mirror(self, record: Record) -> str | None:
        """Write a run, numbers first: whatever fails after them, they are in it."""
        mode = os.environ.get("WANDB_MODE") or self.mode
        one_of("WANDB_MODE", mode, MODES)
        if mode == "disabled":
            return None
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or W&B reports its crashes to a server of its own
        import wandb

        record.folder.mkdir(parents=True, exist_ok=True)  # or W&B would write to the temporary directory
        wandb.setup(wandb.Settings(silent=True))  # process-wide: settings of a run come too late for some messages
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode="offline",
            dir=str(record.folder),
            id=record.key,
            reinit="finish_previous",
            group=record.group[:128],  # W&B's limits: a longer name or tag is an error there
            name=record.name[:128],
            tags=[tag[:64] for tag in (*record.tags, *self.tags)],
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
            fill(run, record)
        finally:
            run.finish(exit_code=int(record.error is not None))
        if mode == "online":
            return upload(folder)
        log.info("  tracked    upload it with: %s", command(folder))
        return str(folder)


def command(folder: Path) -> str:
    """What uploads an offline run."""
    return f"wandb sync {shlex.quote(str(folder))}"


def upload(folder: Path) -> str:
    """Send an offline run to the server; its address there.

    Raises:
        OSError: if that fails, with what to do.
    """
    call = [sys.executable, "-m", "wandb", "beta", "sync", str(folder)]
    # Not through this process's W&B service, which would go on trying and hold up the end of this process.
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    try:
        done = subprocess.run(
            call, cwd=folder.parent.parent, env=alone, text=True, timeout=PATIENCE, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the server did not take the run in {PATIENCE:g} s; later: {command(folder)}") from error
    if done.returncode or not list(folder.glob("*.synced")):
        said = done.stdout.strip().rpartition("\n")[2].strip()
        raise OSError(f"the run was not uploaded ({said}); later: {command(folder)}")
    address = re.search(r"https?://\S+/runs/\S+", done.stdout)
    log.info("  tracked    %s", address[0] if address else folder)
    return address[0] if address else str(folder)


def fill(run: wandb.Run, record: Record) -> None:
    """Everything that a record holds."""
    import wandb

    run.summary.update({**record.summary(), **({"error": record.error} if record.error else {})})
    run.define_metric("layer", summary="none")
    run.define_metric("layers/*", step_metric="layer", summary="none")
    for point in record.layers():
        run.log({name if name == "layer" else f"layers/{name}": value for name, value in point.items()})
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
            run.log({title: table(rows)})


def table(rows: Any) -> wandb.Table:
    """Rows (mappings with the same keys) as a table."""
    import wandb

    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
