"""Other processes, forked from this one: no imports to wait for."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

ROUNDS = 20
FORK = multiprocessing.get_context("fork")


def race(work: Callable[[int, int], Any], rounds: int = ROUNDS) -> list[list[Any]]:
    """Run `work(round, process)` for processes 0 and 1, which start each round together; results by round.

    A result is what `work` gives, or the exception that it raises.
    """
    start, results = FORK.Barrier(2), FORK.Queue()

    def run(process: int) -> None:
        for number in range(rounds):
            start.wait(60)
            try:
                result = work(number, process)
            except Exception as error:  # noqa: BLE001 (told to the test)
                result = error
            results.put((number, process, result))

    both = [FORK.Process(target=run, args=(number,)) for number in range(2)]
    for process in both:
        process.start()
    table: list[list[Any]] = [[None, None] for _ in range(rounds)]
    for _ in range(2 * rounds):
        number, process, result = results.get(timeout=120)
        table[number][process] = result
    for process in both:
        process.join()
    return table


def in_another_process(work: Callable[[], Any]) -> Any:
    """What `work` gives, or the exception that it raises, in a process of its own."""
    results = FORK.Queue()

    def run() -> None:
        try:
            results.put(work())
        except Exception as error:  # noqa: BLE001 (told to the test)
            results.put(error)

    process = FORK.Process(target=run)
    process.start()
    result = results.get(timeout=120)
    process.join()
    return result


@contextmanager
def another_process(work: Callable[[Connection], Any]) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process of its own that runs `work`, and a pipe to talk with it: `work` gets the other end. Killed afterwards.

    When the process has ended, what is sent to it breaks the pipe, and what it is asked for is an EOFError.
    """
    here, there = FORK.Pipe()

    def run() -> None:
        here.close()
        work(there)

    process = FORK.Process(target=run)
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()
