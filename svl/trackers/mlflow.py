"""MLflow: one run for each result, in an experiment of the sweep's name.

Without a tracking server, runs go to a local SQLite database with a folder of files beside it: MLflow's older store of
plain files only gets maintenance, and refuses to work unless told otherwise. MLflow numbers runs itself, so the key of
the result is a tag, `svl.key`; a run that is mirrored again replaces the one that has its key.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from svl.core import SvlError, one_of
from svl.text.redaction import redact_text
from svl.trackers.record import Record, Tracker, flatten

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # or MLflow reports its use to a server of its own
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds, and tries: a server that does not answer should not hold up a run
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
BATCH = 100  # MLflow's limit of parameters in one call
LONGEST = 500  # characters of a parameter's value that every MLflow server takes
LONGEST_NAME = 250  # characters of a metric's or parameter's name
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")  # of a server or database


@dataclass(frozen=True)
class Mlflow(Tracker):
    """See the module.

    Attributes:
        uri: of a tracking server or database; None: a database in `folder`.
        folder: of the local database and its files.
    """

    uri: str | None = None
    folder: str = "outputs/mlflow"

    def check(self) -> None:
        """See the base class; also refuses addresses that MLflow does not take (any more)."""
        if importlib.util.find_spec("mlflow") is None:
            raise SvlError("MLflow is missing: pip install 'svl[mlflow]', or set tracker=none")
        if self.uri is not None:
            scheme = self.uri.partition(":")[0].partition("+")[0]  # of mysql+pymysql, say
            one_of("the scheme of tracker.uri", redact_text(scheme), SCHEMES)

    def mirror(self, record: Record) -> str | None:
        """Write a run."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

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
                write_mlflow_run(client, run, record)
            finally:
                client.set_terminated(run, "FAILED" if record.error else "FINISHED")
            for old in before:
                client.delete_run(old.info.run_id)
        shown = redact_text(uri)
        log.info("  tracked    %s", shown if self.uri else f"look at it with: mlflow ui --backend-store-uri {shown}")
        return shown

    @contextmanager
    def _place(self) -> Iterator[tuple[str, str | None]]:
        """Where runs go and where their files (None: the server decides). A local database has one writer at a time."""
        if self.uri:
            yield self.uri, None
            return
        folder = Path(self.folder).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=self.timeout / 2):
            yield f"sqlite:///{folder / 'mlflow.db'}", (folder / "files").as_uri()


def write_mlflow_run(client: MlflowClient, run: str, record: Record) -> None:
    """Everything that a record holds."""
    from mlflow.entities import Metric, Param

    if record.error:
        client.set_tag(run, "error", record.error)
    now = int(1000 * time.time())
    summary = record.summary()
    numbers = [
        Metric(name, value, now, 0) for name, value in zip(allowed_names(summary), summary.values(), strict=True)
    ]
    for point in record.layers():
        step = int(point.pop("layer"))
        names = allowed_names(f"layers/{name}" for name in point)
        numbers += [Metric(name, value, now, step) for name, value in zip(names, point.values(), strict=True)]
    for moment in record.training:
        names = allowed_names(f"recover/{name}" for name in moment)
        numbers += [Metric(n, value, now, int(moment["step"])) for n, value in zip(names, moment.values(), strict=True)]
    config = list(flatten(record.config))
    names = allowed_names(name for name, _ in config)
    settings = [Param(name, str(value)[:LONGEST]) for name, (_, value) in zip(names, config, strict=True)]
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


def allowed_names(names: Iterable[str]) -> list[str]:
    """Names as MLflow takes them, all different: paths of letters, digits, "_", "-", "." and spaces, none too long."""
    found: dict[str, None] = {}
    for name in names:
        words = [re.sub(r"[^\w.\- ]", "_", word) for word in name.split("/")]
        path = "/".join(word.replace(".", "_") if set(word) <= {"."} else word for word in words if word) or "_"
        path, number = path[:LONGEST_NAME].rstrip("/"), 1
        while path in found:
            number += 1
            path = f"{path[: LONGEST_NAME - 8]}-{number}"
        found[path] = None
    return list(found)


def parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """So many at a time as MLflow takes."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
