"""Processes of one run: they talk, and end when one of them falls silent."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap

import pytest
from helpers.commands import ENVIRONMENT

SCRIPT = """
    import sys, time
    from svl import processes

    processes.SILENCE = 4.0
    processes.join_processes()
    print(processes.gather_values(processes.process_rank() + 1), processes.broadcast_word("x"), flush=True)
    def work():
        if processes.process_rank() == 1:
            raise MemoryError("no room")

    if sys.argv[1] == "fail":
        processes.all_or_none(work)
    if sys.argv[1] == "wait":
        processes.gather_values(sys.stdin.readline())
    elif processes.process_rank() == 0:
        time.sleep(1.5 * processes.SILENCE)
"""


@pytest.fixture
def start():
    """Start two processes of one run; ended afterwards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []

    def run(what: str) -> list[subprocess.Popen[str]]:
        for rank in "01":
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": rank}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", textwrap.dedent(SCRIPT), what],
                    env={**ENVIRONMENT, **place, "GLOO_SOCKET_IFNAME": "lo"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        assert [process.stdout.readline() for process in started] == ["[1, 2] x\n"] * 2
        return started

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_a_silent_process_ends_the_others(start):
    first, second = start("wait")
    second.send_signal(signal.SIGSTOP)  # as if its machine were gone: it closes no connection
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.wait() == 1
    assert "error: process 1 of 2 has been silent" in first.stderr.read()


def test_one_that_has_left_is_not_missed(start):
    processes = start("leave")
    assert [process.wait() for process in processes] == [0, 0]


def test_what_fails_in_one_is_known_to_all(start):
    """Whatever it is: one that leaves without a word would leave the others waiting for it."""
    first, second = start("fail")
    assert [process.wait() for process in (first, second)] == [1, 1]
    assert "svl.core.errors.SvlError: process 1: no room" in first.stderr.read()
    assert "MemoryError: no room" in second.stderr.read()
