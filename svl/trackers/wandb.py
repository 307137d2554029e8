"""Weights & Biases: one run for each result, its summary the row of the runs table.

A run is written to a folder without network. Offline, which is the default, that is all, and the command that uploads
it is printed; online, it is uploaded at once. Processes of their own do both, and have so many seconds, because W&B's
client would go on trying for days when a server or disk is lost. Runs have the key of the result as their id: mirrored
twice, they are one there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from svl.core import SvlError, one_of
from svl.trackers.child_process import run_in_time
from svl.trackers.record import Record, Tracker

log = logging.getLogger(__name__)
MODES = ("offline", "online", "disabled")
SAME_MODE = {"dryrun": "offline", "run": "online"}  # W&B's older names
FORBIDDEN = "/\\#?%:"  # in the name of a project
LONGEST_PROJECT = 128  # characters
SOURCES = str(Path(__file__).parents[2])  # where this package is found, installed or not


@dataclass(frozen=True)
class Wandb(Tracker):
    """See the module.

    Attributes:
        project: name of the project; in the configuration, the environment variable WANDB_PROJECT is its default.
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

    def _mode(self) -> str:
        """The mode that counts.

        Raises:
            SvlError: if WANDB_MODE is no mode.
        """
        mode = os.environ.get("WANDB_MODE") or self.mode
        mode = SAME_MODE.get(mode, mode)
        one_of("WANDB_MODE", mode, MODES)
        return mode

    def check(self) -> None:
        """See the base class; W&B's rules for names of projects."""
        if self._mode() == "disabled":
            return
        if importlib.util.find_spec("wandb") is None:
            raise SvlError("Weights & Biases is missing: pip install wandb, or set tracker=none")
        found = sorted(set(self.project) & set(FORBIDDEN))
        if not self.project or found or len(self.project) > LONGEST_PROJECT:
            raise SvlError(
                f"tracker.project is '{self.project}', but W&B takes names of 1 to {LONGEST_PROJECT} characters "
                f"without {' '.join(FORBIDDEN)}"
            )

    def mirror(self, record: Record) -> str | None:
        """Write a run, numbers first: whatever fails after them, they are in it.

        Raises:
            OSError: if that fails, or takes longer than `timeout`, with what to do.
        """
        mode = self._mode()
        if mode == "disabled":
            return None
        end = time.monotonic() + self.timeout
        folder = self._write(record)
        if mode == "online":
            return upload(folder, max(1.0, end - time.monotonic()))
        log.info("  tracked    upload it with: %s", upload_command(folder))
        return str(folder)

    def _write(self, record: Record) -> Path:
        """Write an offline run in a process of its own (svl.trackers.wandb_writer); its folder."""
        record.folder.mkdir(parents=True, exist_ok=True)  # or W&B would write to the temporary directory
        body = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        given = {"record": body, "project": self.project, "entity": self.entity, "tags": list(self.tags)}
        path = os.pathsep.join([SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            done = run_in_time(
                [sys.executable, "-P", "-m", "svl.trackers.wandb_writer"],
                self.timeout,
                record.folder,
                given=json.dumps(given, default=_as_text),
                environment={"PYTHONPATH": path},
            )
        except TimeoutError as error:
            raise OSError(f"W&B's client did not end within {self.timeout:g} s (tracker.timeout)") from error
        if done.returncode:
            raise OSError(_last_line(done.stdout) or "W&B's client failed without a word")
        return Path(_last_line(done.stdout))


def _as_text(value: object) -> str:
    """What JSON has no type for: paths, absolute because the writer runs elsewhere, and anything else in settings."""
    return str(value.absolute() if isinstance(value, Path) else value)


def upload_command(folder: Path) -> str:
    """What uploads an offline run."""
    return f"wandb sync {shlex.quote(str(folder))}"


def upload(folder: Path, seconds: float) -> str:
    """Send an offline run to the server; its address there.

    Raises:
        OSError: if that fails or takes longer, with what to do.
    """
    command = [sys.executable, "-m", "wandb", "beta", "sync", str(folder)]
    try:
        done = run_in_time(command, seconds, folder.parent.parent)
    except TimeoutError as error:
        raise OSError(f"the server did not take the run in {seconds:.0f} s; later: {upload_command(folder)}") from error
    if done.returncode or not list(folder.glob("*.synced")):
        raise OSError(f"the run was not uploaded ({_last_line(done.stdout)}); later: {upload_command(folder)}")
    address = re.search(r"https?://\S+/runs/\S+", done.stdout)
    log.info("  tracked    %s", address[0] if address else folder)
    return address[0] if address else str(folder)


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()
