"""The processes that torchrun started on one run: how many there are, and how they talk.

They talk through gloo, whatever the device.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from svl.core.errors import SvlError

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.nn import Parameter

T = TypeVar("T")

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # what gloo says of it
SILENCE = 300.0  # seconds without a sign of life after which a process counts as dead


def process_count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def join_processes() -> None:
    """Connect to the other processes, once, and take an accelerator of one's own where there is one.

    A process that ends closes its connections, which the others notice at their next word to it. One that falls silent
    (its machine is gone) is noticed by its missing heartbeat: the others then end after SILENCE seconds.
    """
    from torch import accelerator, distributed

    if process_count() == 1 or distributed.is_initialized():
        return
    if accelerator.is_available():
        accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    store, rank, size = next(distributed.rendezvous("env://"))
    group = distributed.PrefixStore("svl", store)
    # A benchmark may take the others hours.
    distributed.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=timedelta(days=1))
    beats = distributed.PrefixStore("heartbeat", store)
    leaving = threading.Event()
    watch = threading.Thread(target=_watch_others, args=(beats, rank, size, leaving), name="heartbeat", daemon=True)
    watch.start()

    def leave() -> None:
        leaving.set()
        watch.join()  # a thread that talks while the interpreter ends would abort it
        with suppress(RuntimeError):  # the first process, which keeps the store, has left already
            beats.set(f"{rank} left", "")
        if distributed.is_initialized():  # gloo's threads, too, would abort an interpreter that ends
            distributed.destroy_process_group()

    atexit.register(leave)


def _watch_others(beats: Store, rank: int, size: int, leaving: threading.Event) -> None:
    """Show that this process is there, and end it when another one has not done so for SILENCE seconds."""
    with suppress(RuntimeError):  # the first process, which keeps the store, has left
        _exchange_beats(beats, rank, size, leaving)


def _exchange_beats(beats: Store, rank: int, size: int, leaving: threading.Event) -> None:
    others = [other for other in range(size) if other != rank]
    seen: dict[int, tuple[bytes, float]] = {other: (b"", time.monotonic()) for other in others}
    beat = 0
    while not leaving.is_set():
        beat += 1
        beats.set(str(rank), str(beat))
        for other in others:
            if beats.check([str(other)]) and beats.get(str(other)) != seen[other][0]:
                seen[other] = (beats.get(str(other)), time.monotonic())
            silent = time.monotonic() - seen[other][1]
            if silent > SILENCE and not beats.check([f"{other} left"]):
                print(f"error: process {other} of {size} has been silent for {silent:.0f} s; ending", file=sys.stderr)
                os._exit(1)  # the main thread may be waiting for it, and cannot be interrupted
        leaving.wait(min(10.0, SILENCE / 3))


@contextmanager
def _others_listening() -> Iterator[None]:
    """Within the block, gloo's word for a process that has gone becomes a plain one."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in GONE):
            raise
        raise SvlError("another process of this run has ended: what it printed, if it could, says why") from error


def gather_values(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if process_count() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * process_count()
    with _others_listening():
        distributed.all_gather_object(values, value)
    return values


def my_share(n: int) -> range:
    """Which of `n` pieces of work are this process's: every so manyth, so that long neighbours are shared out."""
    return range(process_rank(), n, process_count())


def gather_shares(share: Sequence[T], n: int) -> list[T]:
    """The results of all processes in the order of the `n` pieces of work, of which each has done `my_share`.

    In this order sums come out as in one process, bit for bit.
    """
    shares = gather_values(list(share))
    return [shares[i % len(shares)][i // len(shares)] for i in range(n)]


def all_or_none(work: Callable[[], T]) -> T:
    """What `work` gives in this process, when all have done theirs.

    Raises:
        SvlError: if another process has failed; one that has failed itself raises what it failed with. So none waits
            for another that has given up.
    """
    if process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 (raised below, when the others know)
        failure = error
    try:
        told = gather_values(None if failure is None else str(failure) or type(failure).__name__)
    finally:
        if failure is not None:
            raise failure
    if failed := [f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None]:
        raise SvlError(failed[0])
    return cast("T", result)


def broadcast_word(word: str = "") -> str:
    """What the first process says."""
    from torch import distributed

    words = [word]
    with _others_listening():
        distributed.broadcast_object_list(words, src=0)
    return words[0]


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Give every process the mean of the gradients of all; a process that has none, where others do, counts as zeros.

    They go through the CPU's memory, parameter by parameter.
    """
    if process_count() == 1:
        return
    from torch import distributed, zeros_like

    who_has = zip(*gather_values([parameter.grad is not None for parameter in parameters]), strict=True)
    for parameter, has in zip(parameters, who_has, strict=True):
        if not any(has):
            continue
        if parameter.grad is None:
            parameter.grad = zeros_like(parameter)
        total = parameter.grad.cpu()
        with _others_listening():
            distributed.all_reduce(total)
        parameter.grad.copy_(total / process_count())


@contextmanager
def seeming_alone() -> Iterator[None]:
    """Within the block, libraries that look for other processes find none, and do not divide work themselves."""
    of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    of_mpi = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    kept = {name: os.environ.pop(name) for name in (*of_torchrun, *of_mpi) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
