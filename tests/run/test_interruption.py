"""Ctrl-C and SIGTERM, in runs and in sweeps."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers.commands import ENVIRONMENT, QUIET, start_svl, svl_process

LONG = ("strategy=shortgpt", "calibration.batch_size=1", *QUIET)


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Until a file in `folder` matches `pattern`."""
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_ends_in_one_line_and_leaves_nothing_half_done(number, code, tmp_path):
    process = start_svl(*LONG, cwd=tmp_path)
    wait_for(process, tmp_path, "store/tmp/stats-*/traces-00002.safetensors")
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert err.splitlines()[-1] == (
        "interrupted: finished stages are kept in the store; give the same command again to go on"
    )
    assert "Traceback" not in err
    assert not list(tmp_path.glob("store/tmp/stats-*"))
    assert not list(tmp_path.glob("store/stats/*"))
    assert not list(tmp_path.rglob("failed.txt"))


def test_a_sweep_says_how_far_it_came_and_goes_on_from_there(tmp_path):
    words = ("-m", "strategy=tail,shortgpt", "calibration.batch_size=1", "calibration.samples=24", *QUIET)
    process = start_svl(*words, cwd=tmp_path)
    wait_for(process, tmp_path, "store/tmp/stats-*/traces-00001.safetensors")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted after 1 of 2 jobs: ")
    assert re.search(r"plan +stored", svl_process(*words, cwd=tmp_path).stdout)


def test_the_second_signal_ends_at_once():
    code = """
        import os, signal, sys
        from svl.run import interruption

        try:
            with interruption.orderly_end():
                os.kill(os.getpid(), signal.SIGINT)
        except interruption.Interrupted as stop:
            print(stop.exit_code, flush=True)
            with interruption.orderly_end():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)
                    print("still there", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "130\n"
    assert done.returncode == -signal.SIGINT


def test_handlers_are_put_back():
    from svl.run import interruption

    before = signal.getsignal(signal.SIGTERM)
    with interruption.orderly_end():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
