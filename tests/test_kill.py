"""Sweeps that are killed at any moment, again and again, end with the tables of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_cli import ENVIRONMENT, SMALL, numbers, read

from svl.store import Store

# Imports once what sweeps need. "begin ARGUMENTS" starts one in a process (and group) of its own and says its number;
# "wait NUMBER" says how that ended.
SERVER = textwrap.dedent("""
    import os, sys
    import svl.cli, svl.calibrate, svl.compensation.subspace, svl.evaluate, svl.export, svl.pipeline

    print("ready", flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(int(rest[0]), 0)[1]), flush=True)
        elif (child := os.fork()) == 0:
            os.setpgid(0, 0)
            os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            sys.argv[1:] = rest
            svl.cli.main()
            os._exit(0)
        else:
            os.setpgid(child, child)
            print(child, flush=True)
""")
SWEEP = ("-m", "strategy=shortgpt,short_lvlm", "tracker=none", "benchmark.limit=2", *SMALL, "paths.store=store",
         "benchmark.tasks={svl_demo_open:{metric:accuracy}}", "~benchmark.tasks.svl_demo_choice",
         "~benchmark.tasks.svl_demo_existence")  # fmt: skip


@pytest.fixture
def say(tmp_path):
    """Says a line to a server in `tmp_path`; its answer."""
    pytest.importorskip("lmms_eval")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=tmp_path, env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def said(*words: str) -> int:
        process.stdin.write(" ".join(words) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    assert process.stdout.readline() == "ready\n"
    yield said
    process.kill()
    process.wait()


def whole(root: Path) -> int:
    """The number of artifacts in a store, each of which must be whole."""
    store, stages = Store(root), [s for s in root.glob("*") if s.name not in ("tmp", "lock")]
    folders = [folder for stage in stages for folder in stage.glob("*")]
    assert all(store.read(folder) for folder in folders)
    return len(folders)


def tables(folder: Path) -> tuple[list[dict], dict[str, str]]:
    """Numbers of the last sweep's jobs in their order, and all answers."""
    last = max((folder / "out" / "run").iterdir())
    answers = {file.parent.name: file.read_text() for file in folder.glob("store/score/*/samples.jsonl")}
    return [numbers(read(last / n)[1]) for n in "01"], answers


def test_sweeps_killed_at_any_moment_end_with_the_tables_of_one_left_alone(say, tmp_path):
    """Twenty SIGKILLs of process groups. In every third round two sweeps work on one store, and both are killed."""

    def undisturbed() -> None:
        process = say("begin", *SWEEP, "paths.outputs=out")
        assert say("wait", str(process)) == 0, (tmp_path / "log").read_text()

    chance, store, began = random.Random(0), tmp_path / "store", time.monotonic()
    undisturbed()
    length = time.monotonic() - began
    expected, total = tables(tmp_path), whole(store)
    store.rename(tmp_path / "undisturbed")
    kills, halfway = 0, set()
    for number in range(100):
        started = time.monotonic()
        running = [say("begin", *SWEEP, f"paths.outputs=killed-{k}") for k in range(2 if number % 3 == 2 else 1)]
        for process in running:
            time.sleep(chance.uniform(0, length))
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        ended = [say("wait", str(process)) for process in running]
        assert set(ended) <= {0, -signal.SIGKILL}, (tmp_path / "log").read_text()
        kills += ended.count(-signal.SIGKILL)
        halfway.add(found := whole(store) if store.exists() else 0)
        if kills >= 20:
            break
        if found == total:  # done in spite of everything: once more from the start
            store.rename(tmp_path / f"done-{number}")
            length = min(length, time.monotonic() - started)
    assert kills >= 20
    assert len(halfway) > 3  # different places to go on from
    undisturbed()
    assert tables(tmp_path) == expected
    assert whole(store) == total
    assert not list((store / "tmp").iterdir())
