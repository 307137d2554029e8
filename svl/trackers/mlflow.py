"""MLflow: one run for each result, in an experiment of the sweep's name.

Without a tracking server, runs go to a local SQLite database with a folder of files beside it: MLflow's older store of
plain files only gets maintenance, and refuses to work unless told otherwise. MLflow numbers runs itself, so the key of
the result is a tag, `svl.key`; a run that is mirrored again replaces the one that has its key.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from svl.core import SvlError
from svl.record import Record, flat

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # or MLflow reports its use to a server of its own
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds, and tries: a server that does not answer should not hold up a run
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
PATIENCE = 60  # seconds to wait for other runs that write to the local database
BATCH = 100  # MLflow's limit of parameters in one call
LONGEST = 500  # characters of a parameter's value that every MLflow server takes


@dataclass(frozen=True)
class Mlflow:
    """See the module.

    Attributes:
        uri: of a tracking server or database; None: a database in `folder`.
        folder: of the local database and its files.
    """

    uri: str | None = None
    folder: str = "outputs/mlflow"

    def mirror(self, record: Record) -> str | None:
        """Write a run.

        Raises:
            SvlError: if MLflow is not installed.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise SvlError(f"MLflow is missing ({error}): pip install 'svl[mlflow]'") from error

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._place() as (uri, files):
            client = MlflowClient(uri)
            known = client.get_experiment_by_name(record.group)
            where = known.experiment_id if known else client.create_experiment(record.group, files)
            before = client.search_runs([where], f"tags.`svl.key` = '{record.key}'")
            tags = dict(tag.partition(":")[::2] for tag in record.tags)
            run = client.create_run(where, run_name=record.name, tags={"svl.key": record.key, **tags}).info.run_id
            try:
                fill(client, run, record)
            finally:
                client.set_terminated(run, "FAILED" if record.error else "FINISHED")
            for old in before:
                client.delete_run(old.info.run_id)
        log.info("  tracked    %s", uri if self.uri else f"look at it with: mlflow ui --backend-store-uri {uri}")
        return uri

    @contextmanager
    def _place(self) -> Iterator[tuple[str, str | None]]:
        """Where runs go and where their files (None: the server decides). A local database has one writer at a time."""
        if self.uri:
            yield self.uri, None
            return
        folder = Path(self.folder).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=PATIENCE):
            yield f"sqlite:///{folder / 'mlflow.db'}", (folder / "files").as_uri()


def fill(client: MlflowClient, run: str, record: Record) -> None:
    """Everything that a record holds."""
    from mlflow.entities import Metric, Param

    if record.error:
        client.set_tag(run, "error", record.error)
    now = int(1000 * time.time())
    numbers = [Metric(name, value, now, 0) for name, value in record.summary().items()]
    for point in record.layers():
        step = int(point.pop("layer"))
        numbers += [Metric(f"layers/{name}", value, now, step) for name, value in point.items()]
    settings = [Param(name, str(value)[:LONGEST]) for name, value in flat(record.config)]
    for some in parts(numbers):
        client.log_batch(run, metrics=some)
    for some in parts(settings):
        client.log_batch(run, params=some)
    for path in record.figures.values():
        client.log_artifact(run, str(path), "figures")
    for kind, files in record.files.items():
        for file in files:
            client.log_artifact(run, str(file), kind)
    if record.flips:
        rows = [dict(flip) for flip in record.flips]
        client.log_table(run, {name: [row[name] for row in rows] for name in rows[0]}, "flips.json")


def parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """So many at a time as MLflow takes."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
