"""Runs that are killed at any moment, or work side by side on one store, end as one that was left alone."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest
from helpers.commands import QUIET, SMALL, manifests, numbers, read

from svl.store.artifacts import Store

pytest.importorskip("lmms_eval")

SCORED = (
    *("benchmark=demo", "benchmark.limit=2", "benchmark.tasks={svl_demo_open:{metric:accuracy}}"),
    *("~benchmark.tasks.svl_demo_choice", "~benchmark.tasks.svl_demo_existence"),
    *("tracker=none", *SMALL),
)
SWEEP = ("-m", "strategy=shortgpt,short_lvlm", *SCORED, "paths.store=store")
KILLS = 9


def whole(root: Path) -> int:
    """The number of artifacts in a store, each of which must be whole. (Scratch of a killed process is none.)"""
    folders = [file.parent for file in root.glob("*/*/manifest.json") if file.parents[1].name != "tmp"]
    assert all(Store(root).read(folder) for folder in folders)
    return len(folders)


def tables(folder: Path) -> tuple[list[dict], dict[str, str]]:
    """Numbers of the last sweep's jobs in their order, and all answers."""
    last = max((folder / "out" / "run").iterdir())
    answers = {file.parent.name: file.read_text() for file in folder.glob("store/score/*/samples.jsonl")}
    return [numbers(read(last / n)[1]) for n in "01"], answers


def test_sweeps_killed_at_any_moment_end_with_the_tables_of_one_left_alone(fork_server, tmp_path):
    """SIGKILLs at random events. In every third round two sweeps work on one store, and both are killed."""

    def undisturbed() -> int:
        run = fork_server.start(*SWEEP, "paths.outputs=out", cwd=tmp_path)
        assert fork_server.wait(run) == 0, fork_server.log(run)
        return fork_server.events(run)

    chance, store = random.Random(0), tmp_path / "store"
    events = undisturbed()
    expected, total = tables(tmp_path), whole(store)
    store.rename(tmp_path / "undisturbed")
    kills, rounds, halfway = 0, 0, set()
    while kills < KILLS:
        together = 2 if rounds % 3 == 2 else 1
        runs = [
            fork_server.start(*SWEEP, f"paths.outputs=killed-{k}", cwd=tmp_path, last_event=chance.randint(1, events))
            for k in range(together)
        ]
        ended = [fork_server.wait(run) for run in runs]
        assert set(ended) <= {0, -signal.SIGKILL}, "\n\n".join(map(fork_server.log, runs))
        kills += ended.count(-signal.SIGKILL)
        rounds += 1
        halfway.add(whole(store))
        if 0 in ended:  # done in spite of everything: once more from the start
            store.rename(tmp_path / f"done-{rounds}")
    assert len(halfway) > 3  # different places to go on from
    undisturbed()
    assert tables(tmp_path) == expected
    assert whole(store) == total
    assert not list((store / "tmp").iterdir())


def test_a_killed_run_goes_on_with_its_finished_stages(fork_server, tmp_path):
    """Killed again and again, each time later: what was finished is never touched, and the result is the same."""
    command = ("strategy=short_lvlm", *SCORED)
    run = fork_server.start(*command, "paths.store=left-alone", "paths.outputs=out", cwd=tmp_path)
    assert fork_server.wait(run) == 0, fork_server.log(run)
    events, store = fork_server.events(run), tmp_path / "store"
    finished: dict[str, int] = {}
    for quarter in (1, 2, 3):
        places = ("paths.store=store", "paths.outputs=killed")
        run = fork_server.start(*command, *places, cwd=tmp_path, last_event=events * quarter // 4)
        ended = fork_server.wait(run)  # with stages that are stored, a run has fewer events, and may get to its end
        assert ended == -signal.SIGKILL or (quarter > 1 and ended == 0)
        now = manifests(store)
        assert finished.items() <= now.items()
        finished = now
    assert {name.split("/")[0] for name in finished} >= {"stats", "plan"}
    run = fork_server.start(*command, "paths.store=store", "paths.outputs=resumed", cwd=tmp_path)
    assert fork_server.wait(run) == 0, fork_server.log(run)
    for stage in ("calibrate", "plan"):
        assert re.search(rf"stored .*{stage}", fork_server.log(run))
    assert finished.items() <= manifests(store).items()
    assert manifests(store).keys() == manifests(tmp_path / "left-alone").keys()
    alone, resumed = (
        read(next(p.parent for p in (tmp_path / name).rglob("result.json"))) for name in ("out", "resumed")
    )
    assert resumed[0] == alone[0]
    assert numbers(resumed[1]) == numbers(alone[1])
    assert alone[1]["scores"]["svl_demo_open"]["n"] == 2


def test_two_processes_on_one_store_calibrate_once(fork_server, tmp_path):
    command = ("strategy=shortgpt", *QUIET, "calibration.samples=16", "calibration.batch_size=2")
    both = [fork_server.start(*command, cwd=tmp_path) for _ in range(2)]
    assert [fork_server.wait(run) for run in both] == [0, 0]
    assert len(list((tmp_path / "store" / "stats").glob("*/manifest.json"))) == 1
    assert sorted(bool(re.search(r"stored .*calibrate", fork_server.log(run))) for run in both) == [False, True]
    first, second = (read(p.parent) for p in (tmp_path / "out").rglob("result.json"))
    assert first[:2] == second[:2]
