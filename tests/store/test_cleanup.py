"""What `svl-report gc` removes, and what it never does."""

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.races import another_process

from svl.core import SvlError
from svl.store import cleanup
from svl.store.artifacts import Store
from svl.store.cleanup import clean_store, find_leftovers, remove_leftover
from svl.store.contents import list_artifacts
from svl.store.in_use import end_lease
from svl.store.layout import MARKER
from svl.store.locks import Lock

LONG_AGO = time.time() - 200_000


def present(store):
    """What is in the store, as stage/key."""
    return {f"{artifact.stage}/{artifact.key}" for artifact in list_artifacts(store)}


def cleaned(store, unreferenced=False, days=1.0, remove=True):
    """The output of a cleaning."""
    return "\n".join(clean_store(store, unreferenced, days, remove))


@pytest.fixture
def remains(filled_store):
    """A half-written plan, scratch of an older version, and a damaged score."""
    names = (f"plan-{'a' * 16}", f"stats-{'b' * 16}.host-1-{'c' * 16}", "served-4711", f"served.host-1-{'d' * 16}")
    half = [filled_store.root / "tmp" / name for name in names]
    for place in half:
        place.mkdir(parents=True)
        (place / "x").write_text("x")
        for path in (place / "x", place):
            os.utime(path, (LONG_AGO, LONG_AGO))
    with (filled_store.root / "score" / filled_store.score / "data.bin").open("ab") as file:
        file.write(b"more")
    return half


def test_nothing_is_removed_unless_told(filled_store, remains):
    before = sorted(filled_store.root.rglob("*"))
    out = cleaned(filled_store, remove=False)
    assert sorted(filled_store.root.rglob("*")) == before
    for place in remains:
        assert f"tmp/{place.name}  1 Byte  half-written" in out
    assert f"score/{filled_store.score}" in out
    assert "say yes=true" in out
    assert filled_store.lonely not in out


def test_only_leftovers_are_removed(filled_store, remains):
    intact = present(filled_store) - {f"score/{filled_store.score}"}
    with filled_store.scratch("served") as used:
        used.mkdir()
        assert "removed: " in cleaned(filled_store)
        assert [path.name for path in (filled_store.root / "tmp").iterdir()] == [used.name]
        used.rmdir()
    assert not (filled_store.root / "score" / filled_store.score).exists()
    assert present(filled_store) == intact
    assert list((filled_store.root / "lock").iterdir()) == []
    assert "nothing to remove" in cleaned(filled_store)


def test_what_runs_refer_to_stays(filled_store):
    store, everything = filled_store, present(filled_store)
    cleaned(store, unreferenced=True)
    assert present(store) == everything  # too young: a sweep may be about to use it
    cleaned(store, unreferenced=True, days=0)
    gone = {f"plan/{store.lonely}", f"score/{store.unused}", f"track/{store.orphan}"}
    assert present(store) == everything - gone
    (store.root / "run" / store.run / "manifest.json").unlink()  # a damaged run refers to nothing
    cleaned(store, unreferenced=True, days=0)
    assert present(store) == {f"probe/{store.probe}"}


# ---------------------------------------------------------------------------------------------- not a store


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_that_are_no_store_are_never_cleaned(tmp_path, filled_store):
    """A slip for outputs/store: the output folders of an experiment called `run`, and data of one's own."""
    for name in ("run/2025-01-01/result.json", "data/pictures/1.png", "plan/mine/plan.json", "tmp/notes", "lock/key"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    for unreferenced in (False, True):
        with pytest.raises(SvlError, match=r"is not marked as a store, so nothing in it is removed.*echo"):
            cleaned(Store(tmp_path), unreferenced, days=0)
    assert tree(tmp_path) == before


def test_only_names_of_a_stores_own_are_removed_even_if_it_is_marked(filled_store):
    for name in (
        "run/2025-01-01/x",
        "plan/0123456789ABCDEF/x",
        "plan/0123456789abcde/x",
        "tmp/mine/x",
        "lock/x",
        "x/y",
    ):
        (filled_store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (filled_store.root / name).write_text("precious")
    before = tree(filled_store.root)
    cleaned(filled_store, unreferenced=True, days=0)
    assert sum(text == b"precious" for text in tree(filled_store.root).values()) == 6
    assert sum(text == b"precious" for text in before.values()) == 6


@pytest.mark.parametrize("mark", ["{", "[]", '{"format": 2}', '{"format": "1"}', "", '{"format": null}'])
def test_stores_of_an_unknown_format_are_not_touched(filled_store, mark):
    (filled_store.root / MARKER).write_text(mark)
    before = tree(filled_store.root)
    with pytest.raises(SvlError, match=r"is damaged|of format"):
        cleaned(filled_store, unreferenced=True, days=0)
    with pytest.raises(SvlError, match=r"is damaged|of format"):
        filled_store.make("plan", {"new": 1}, lambda _: {})
    assert tree(filled_store.root) == before


# ------------------------------------------------------------------------------------------- other processes


def test_what_another_process_holds_is_spared(filled_store, remains):
    half = remains[0]
    held = [filled_store.root / "lock" / name for name in (half.name, f"score-{filled_store.score}")]

    def hold(told: Connection) -> None:
        locks = [Lock(file) for file in held]
        told.send([lock.acquire() for lock in locks])
        told.recv()

    with another_process(hold) as (process, told):
        assert told.recv() == [True, True]
        for remove in (False, True):
            assert "4 kept: another process is at work on them" in cleaned(filled_store, remove=remove)
            assert half.exists()
            assert (filled_store.root / "score" / filled_store.score).exists()
            assert {path.name for path in held} <= {path.name for path in (filled_store.root / "lock").iterdir()}
        told.send("end")
        process.join()
    cleaned(filled_store)
    assert not half.exists()


def using(store: Store, artifacts: list[tuple[str, dict[str, Any]]]) -> Any:
    """Another process that reads these artifacts of the store, and ends when it is told to."""

    def use(told: Connection) -> None:
        own = Store(store.root)
        told.send([own.make(stage, inputs, lambda _: pytest.fail("it was gone")).reused for stage, inputs in artifacts])
        told.recv()

    return another_process(use)


def test_what_a_running_process_uses_stays_however_old(filled_store):
    """It has read a plan and a score that no run refers to (yet); what they are made of stays, too."""
    store, everything = filled_store, present(filled_store)
    made = store.make("patch", {"plan": store.lonely}, lambda _: {})
    everything = present(store)
    end_lease(store.root)
    used = [("patch", {"plan": store.lonely}), ("score", {"removed": [1]}), ("track", {"run": "gone"})]
    with using(store, used) as (process, told):
        assert told.recv() == [True] * 3
        cleaned(store, unreferenced=True, days=0)
        assert present(store) == everything
        told.send("end")
        process.join()
    cleaned(store, unreferenced=True, days=0)
    gone = {f"plan/{store.lonely}", f"score/{store.unused}", f"track/{store.orphan}", f"patch/{made.key}"}
    assert present(store) == everything - gone
    assert not list((store.root / "in-use").iterdir())


@pytest.mark.parametrize("kill", [False, True])
def test_leases_end_with_their_process(filled_store, kill):
    with using(filled_store, [("score", {"removed": [1]})]) as (process, told):
        assert told.recv() == [True]
        process.kill() if kill else told.send("end")
        process.join()
    cleaned(filled_store, unreferenced=True, days=0)
    assert f"score/{filled_store.unused}" not in present(filled_store)


def test_cleaning_and_reading_at_once_loses_nothing(filled_store):
    """In 20 rounds: an unreferenced artifact is gone before a process looks for it, or stays until it is released."""
    store = filled_store

    def build(folder: Path) -> dict[str, Any]:
        (folder / "data.bin").write_bytes(bytes(1500))
        return {"removed": [1]}

    def read_again_and_again(told: Connection) -> None:
        own = Store(store.root)
        while told.recv():
            end_lease(own.root)
            told.send("started")
            sizes = [(own.make("plan", {"stats": "gone"}, build).path / "data.bin").stat().st_size for _ in range(10)]
            told.send(set(sizes))

    with another_process(read_again_and_again) as (_, told):
        for number in range(20):
            told.send(True)
            assert told.recv() == "started"
            for _ in range(1 + number % 4):
                cleaned(store, unreferenced=True, days=-1)
            assert told.recv() == {1500}
            assert f"plan/{store.lonely}" in present(store)


def test_a_removed_lock_excludes_nobody_twice(filled_store):
    """Who waits for a lock whose file is removed must not hold it beside the next one."""
    file = filled_store.root / "lock" / f"score-{filled_store.unused}"
    folder = filled_store.root / "score" / filled_store.unused
    assert remove_leftover(filled_store, cleanup.Leftover(folder, "", file, folder.exists))
    assert not file.exists()
    with FileLock(file):
        assert not remove_leftover(filled_store, cleanup.Leftover(folder, "", file, lambda: True))


def test_what_became_whole_is_not_removed(filled_store, remains):
    """Between looking and removing, another process may have computed a damaged artifact again."""
    damaged = next(left for left in find_leftovers(filled_store, False, 1) if left.reason == "damaged")
    file = damaged.path / "data.bin"
    file.write_bytes(file.read_bytes()[:-4])
    assert not remove_leftover(filled_store, damaged)
    assert filled_store.read(damaged.path)


def test_what_came_into_use_is_not_removed(filled_store):
    """Between looking and removing, another process may have begun to use an artifact."""
    store = filled_store
    unused = next(left for left in find_leftovers(store, True, 0) if left.path.name == store.unused)
    store.get("score", {"removed": [1]})
    assert not remove_leftover(store, unused)
    assert store.read(unused.path)
    end_lease(store.root)
    assert remove_leftover(store, unused)


def test_links_are_removed_and_not_what_they_lead_to(filled_store, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    links = [
        filled_store.root / "plan" / ("a" * 16),
        filled_store.root / "tmp" / f"plan-{'b' * 16}.host-1-{'c' * 16}",
    ]
    for link in links:
        link.symlink_to(tmp_path / "precious")
    cleaned(filled_store)
    assert not any(link.is_symlink() for link in links)
    assert (tmp_path / "precious" / "file").read_text() == "x"
