"""Weights & Biases: one run for each result, its summary the row of the runs table.

Offline, which is the default, a run is a folder that `wandb sync` uploads; its command is printed. Runs have the key
of the result as their id, so that a run which is mirrored twice is one run there.
"""

from __future__ import annotations

import logging
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svl.core import one_of
from svl.record import Record

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)
PATIENCE = 30.0  # seconds that a server which does not answer may hold up a run, at its start and at its end
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
        one_of("tracker.mode", self.mode, ("offline", "online", "disabled"))

    def mirror(self, record: Record) -> str | None:
        """Write a run, numbers first: whatever fails after them, they are in it."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or W&B reports its crashes to a server of its own
        import wandb

        mode = os.environ.get("WANDB_MODE") or self.mode
        record.folder.mkdir(parents=True, exist_ok=True)  # or W&B would write to the temporary directory
        wandb.setup(wandb.Settings(silent=True))  # process-wide, so that a batch job is never asked to log in
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]  # WANDB_MODE is W&B's to check
            dir=str(record.folder),
            id=record.key,
            resume="allow" if mode == "online" else None,  # offline there is nothing to resume, W&B would warn
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
                init_timeout=PATIENCE,
            ),
        )
        if run.disabled:
            return None
        place: str = run.url or run.settings.sync_dir
        try:
            fill(run, record)
        finally:
            run.finish(exit_code=int(record.error is not None))
        log.info("  tracked    %s", place if run.url else f"upload it with: wandb sync {shlex.quote(place)}")
        return place


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
        for file in files:  # the file itself: W&B's own copy would be gone before an offline run is uploaded
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)
    # Last, because W&B stages tables in the home directory, which on clusters may be read-only.
    for title, rows in (("layers", record.layers()), ("flips", record.flips[:ROWS])):
        if rows:
            run.log({title: table(rows)})


def table(rows: Any) -> wandb.Table:
    """Rows (mappings with the same keys) as a table."""
    import wandb

    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
