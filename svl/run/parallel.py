"""Several processes on one machine, or on one run.

Jobs of a sweep that run in parallel each lease an accelerator, and claim the name of their model.

Of processes that torchrun started on one run (see svl.processes), each evaluates its share of the questions with
its own model. The first does everything else, and everything in the store; the others follow it from stage to stage,
compute with it where a stage is shared, and read what it has stored. They must see the same files.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from svl.core import SvlError
from svl.processes import broadcast_word, join_processes, process_count, process_rank
from svl.run.job_records import FOLDER
from svl.store.artifacts import Entry, Store
from svl.store.files import digest

BUILD = "build"  # what the first process says when it begins to build a stage; else the folder that it has stored

_leased: dict[int, FileLock] = {}


def lease_accelerator(count: int | None = None) -> int | None:
    """Take an accelerator that no other process of this machine has leased, until this process ends; its number.

    Waits while all of `count` (default: as many as there are) are taken. No launcher of Hydra assigns accelerators, so
    this goes by file locks, which the kernel releases when their owner dies. Without accelerators: None.
    """
    from torch import accelerator

    if _leased:
        return next(iter(_leased))
    count = accelerator.device_count() if count is None else count
    folder = Path(tempfile.gettempdir()) / f"svl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while count:
        for number in range(count):
            lock = FileLock(folder / f"accelerator-{number}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _leased[number] = lock
            if accelerator.is_available():
                accelerator.set_device_index(number)
            return number
        time.sleep(1)
    return None


def claim_model_name(folder: Path, name: str, fingerprint: str) -> None:
    """Let a model's name stand for one model in the sweep of this folder: reports go by names.

    Raises:
        SvlError: if a job before this one has given it to another model.
    """
    claim = folder / FOLDER / "models" / digest(name)
    claim.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(claim.with_suffix(".lock")):
        if not claim.exists():
            claim.write_text(fingerprint)
        first = claim.read_text()
    if first != fingerprint:
        raise SvlError(
            f"two different models of this sweep are called '{name}' ({first} and {fingerprint}), and reports could "
            "not tell them apart: give them names, each in a file of conf/model, or by model.name= in two sweeps"
        )


def make_in_step(
    store: Store, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]], shared: bool = False
) -> Entry:
    """`store.make` by all processes of a run: the first one builds (all do, if `shared`), the others get the result."""
    if process_count() == 1:
        return store.make(stage, inputs, build)
    join_processes()
    if process_rank() == 0:
        return _make_as_first(store, stage, inputs, build)
    return _follow_first(store, build, shared)


def _make_as_first(store: Store, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Entry:
    def announce_and_build(folder: Path) -> dict[str, Any]:
        broadcast_word(BUILD)
        return build(folder)

    entry = store.make(stage, inputs, announce_and_build)
    broadcast_word(str(entry.path))
    return entry


def _follow_first(store: Store, build: Callable[[Path], dict[str, Any]], shared: bool) -> Entry:
    word = broadcast_word()
    while word == BUILD:  # a build may fail and be tried again
        if shared:
            with tempfile.TemporaryDirectory() as folder:
                build(Path(folder))
        word = broadcast_word()
    entry = store.read(Path(word))
    if entry is None:
        raise RuntimeError(f"process {process_rank()} does not see {word}: all processes need the same store")
    return entry
