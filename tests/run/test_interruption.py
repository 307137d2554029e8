"""Ctrl-C and SIGTERM, in runs and in sweeps."""

from __future__ import annotations

import os
import re
import signal
from multiprocessing.connection import Connection

import pytest
from helpers.commands import QUIET, run_svl
from helpers.races import another_process

from svl.run import interruption

LONG = ("strategy=shortgpt", "calibration.batch_size=1", *QUIET)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_ends_in_one_line_and_leaves_nothing_half_done(number, code, fork_server, tmp_path):
    run = fork_server.start(*LONG, cwd=tmp_path)
    assert fork_server.interrupt(run, number, at="store/tmp/stats-*/traces-00002.safetensors") == code
    assert fork_server.errors(run).splitlines()[-1] == (
        "interrupted: finished stages are kept in the store; give the same command again to go on"
    )
    assert "Traceback" not in fork_server.errors(run)
    assert not list(tmp_path.glob("store/tmp/stats-*"))
    assert not list(tmp_path.glob("store/stats/*"))
    assert not list(tmp_path.rglob("failed.txt"))


def test_a_sweep_says_how_far_it_came_and_goes_on_from_there(fork_server, tmp_path):
    words = ("-m", "strategy=tail,shortgpt", "calibration.batch_size=1", "calibration.samples=24", *QUIET)
    run = fork_server.start(*words, cwd=tmp_path)
    assert fork_server.interrupt(run, signal.SIGINT, at="store/tmp/stats-*/traces-00001.safetensors") == 130
    assert "Traceback" not in fork_server.errors(run)
    assert fork_server.errors(run).splitlines()[-1].startswith("interrupted after 1 of 2 jobs: ")
    assert re.search(r"stored .*plan", run_svl(*words, cwd=tmp_path).stdout)


def test_the_second_signal_ends_at_once():
    def work(told: Connection) -> None:
        try:
            with interruption.orderly_end():
                os.kill(os.getpid(), signal.SIGINT)
        except interruption.Interrupted as stop:
            told.send(stop.exit_code)
            with interruption.orderly_end():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)
                    told.send("still there")

    with another_process(work) as (process, told):
        assert told.recv() == 130
        process.join()
        assert process.exitcode == -signal.SIGINT
        with pytest.raises(EOFError):
            told.recv()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with interruption.orderly_end():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
