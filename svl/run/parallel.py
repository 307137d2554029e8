"""Several processes on one machine, or on one run.

Jobs of a sweep that run in parallel each lease an accelerator, and claim the name of their model.

Of processes that torchrun started on one run (see svl.processes), each evaluates its share of the questions with
its own model. The first does everything else, and everything in the store; the others follow it from stage to stage,
compute with it where a stage is shared, and read what it has stored. They must see the same files.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from svl.core import SvlError
from svl.processes import broadcast_word, join_processes, process_count, process_rank
from svl.run.job_records import FOLDER
from svl.store.artifacts import Entry, Store
from svl.store.files import digest

log = logging.getLogger(__name__)

BUILD = "build in "  # and a folder: what the first process says when it begins a stage; else where it has stored it

Help = Callable[[Path], object]  # what the other processes do for a stage, given the folder that the first builds in

VISIBLE = "CUDA_VISIBLE_DEVICES"

_leased: dict[int, FileLock] = {}


def lease_accelerator(names: Sequence[str] | None = None) -> int | None:
    """Take an accelerator that no other process of this machine has leased, until this process ends; its number here.

    Waits while all of `names` (default: `accelerator_names`) are taken. No launcher of Hydra assigns accelerators, so
    this goes by file locks, which the kernel releases when their owner dies. The programs that this process starts
    (such as vLLM's) see the leased accelerator only. Without accelerators: None.
    """
    from torch import accelerator

    if _leased:
        return next(iter(_leased))
    names = accelerator_names() if names is None else names
    folder = Path(tempfile.gettempdir()) / f"svl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while names:
        for number, name in enumerate(names):
            lock = FileLock(folder / f"accelerator-{digest(name)}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _leased[number] = lock
            if accelerator.is_available():
                accelerator.set_device_index(number)
                os.environ[VISIBLE] = name
            return number
        time.sleep(1)
    return None


def accelerator_names() -> list[str]:
    """The accelerators that this process sees, by names that all processes of the machine share, in their order here.

    Numbers would not do: they count what a process sees. Of CUDA devices: "GPU-" and the UUID, or the name of a MIG
    instance as CUDA_VISIBLE_DEVICES has it, which is the only way to see one.
    """
    import torch

    count = torch.accelerator.device_count()
    asked = [entry.strip() for entry in os.environ.get(VISIBLE, "").split(",")]
    names = []
    for number in range(count):
        if number < len(asked) and asked[number].startswith("MIG-"):
            names.append(asked[number])
        elif torch.cuda.is_available():
            names.append(f"GPU-{torch.cuda.get_device_properties(number).uuid}")
        else:
            names.append(str(number))
    return names


def in_leased_process(work: Callable[[], None]) -> None:
    """Do `work` in a process of its own that leases an accelerator, which is free again at its end.

    A process keeps some of an accelerator's memory for as long as it lives; one that only starts others needs none.
    """

    def leased() -> None:
        lease_accelerator()
        work()

    process = multiprocessing.get_context("fork").Process(target=leased, name="leased")
    process.start()
    process.join()
    if process.exitcode:
        log.warning("what plans share could not be computed (status %s); jobs go on without it", process.exitcode)


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
    store: Store,
    stage: str,
    inputs: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    help: Help | None = None,
) -> Entry:
    """`store.make` by all processes of a run: the first builds, the others `help` if they can, and get the result."""
    if process_count() == 1:
        return store.make(stage, inputs, build)
    join_processes()
    if process_rank() == 0:
        return _make_as_first(store, stage, inputs, build)
    return _follow_first(store, help)


def _make_as_first(store: Store, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Entry:
    def announce_and_build(folder: Path) -> dict[str, Any]:
        broadcast_word(f"{BUILD}{folder}")
        return build(folder)

    entry = store.make(stage, inputs, announce_and_build)
    broadcast_word(str(entry.path))
    return entry


def _follow_first(store: Store, help: Help | None) -> Entry:
    word = broadcast_word()
    while word.startswith(BUILD):  # a build may fail and be tried again
        if help is not None:
            help(Path(word.removeprefix(BUILD)))
        word = broadcast_word()
    entry = store.read(Path(word))
    if entry is None:
        raise RuntimeError(f"process {process_rank()} does not see {word}: all processes need the same store")
    return entry


def in_scratch(build: Callable[[Path], object]) -> Help:
    """Help by building the same stage in a folder that is thrown away."""

    def help(_: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))

    return help
