"""Several processes on one machine, or on one run.

Jobs of a sweep that run in parallel each `lease` an accelerator. One after the other or not, they `claim` the name of
their model.

Of processes that torchrun started on one run, each evaluates its share of the questions with its own model. The first
does everything else, and everything in the store; the others follow it from stage to stage, compute with it where a
stage is shared, and read what it has stored. They must see the same files. They talk through gloo, whatever the device.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from svl.core import SvlError
from svl.store import Entry, Store, digest

_leased: dict[int, FileLock] = {}


def size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def join() -> None:
    """Connect to the other processes, once, and take an accelerator of one's own where there is one."""
    from torch import accelerator, distributed

    if size() > 1 and not distributed.is_initialized():
        if accelerator.is_available():
            accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        distributed.init_process_group("gloo", timeout=timedelta(days=1))  # a benchmark may take the others hours


def lease(count: int | None = None) -> int | None:
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


def claim(folder: Path, name: str, fingerprint: str) -> None:
    """Let a model's name stand for one model in the sweep of this folder: reports go by names.

    Raises:
        SvlError: if a job before this one has given it to another model.
    """
    place = folder / ".models" / digest(name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not (first := place.read_text() if place.exists() else ""):
            place.write_text(first := fingerprint)
    if first != fingerprint:
        raise SvlError(
            f"two different models of this sweep are called '{name}' ({first} and {fingerprint}), and reports could "
            "not tell them apart: give them names, each in a file of conf/model, or by model.name= in two sweeps"
        )


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if size() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def make(
    store: Store, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]], shared: bool = False
) -> Entry:
    """`store.make`, in step: the first process builds (all do, if `shared`), the others get what it has stored."""
    if size() == 1:
        return store.make(stage, inputs, build)
    join()
    if rank() == 0:

        def lead(folder: Path) -> dict[str, Any]:
            _say("build")
            return build(folder)

        entry = store.make(stage, inputs, lead)
        _say(str(entry.path))
        return entry
    while (said := _say()) == "build":
        if shared:
            with tempfile.TemporaryDirectory() as folder:
                build(Path(folder))
    found = store.read(Path(said))
    if found is None:
        raise RuntimeError(f"process {rank()} does not see {said}: all processes need the same store")
    return found


def _say(word: str = "") -> str:
    """What the first process says."""
    from torch import distributed

    words = [word]
    distributed.broadcast_object_list(words, src=0)
    return words[0]
