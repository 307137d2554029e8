"""svl-report ls, show and gc: what a store holds, and what may go."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from svl.report import contents, main
from svl.report.contents import period, size
from svl.store import Store

YESTERDAY = time.time() - 100_000


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with one run and what it is made of, and a plan and a score that no run refers to."""
    monkeypatch.setenv("SVL_STORE", str(tmp_path / "store"))
    made: Any = Store(tmp_path / "store")

    def write(folder):
        (folder / "data.bin").write_bytes(bytes(1500))

    def add(stage, inputs, **output):
        return made.make(stage, inputs, lambda folder: write(folder) or output).key

    made.stats = add("stats", {"statistics": ["cosine"]}, samples=8)
    made.plan = add("plan", {"stats": made.stats, "strategy": {"class": "svl.strategies.tail.Tail"}}, removed=[3])
    made.score = add("score", {"removed": [3]}, task="t", metric="a", metrics={"a": {"value": 0.5}}, n=4)
    names = {"name": "demo", "model": "tiny", "strategy": "tail", "ratio": 0.25, "seed": 0}
    made.run = add("run", names, **names, keys={"plan": [made.plan], "evaluate": [made.score]})
    made.track = add("track", {"run": made.run}, run=made.run, location="there")
    made.lonely = add("plan", {"stats": "gone"}, removed=[1])
    made.unused = add("score", {"removed": [1]}, task="t", metric="a", metrics={"a": {"value": None}}, n=4)
    made.orphan = add("track", {"run": "gone"}, run="gone")
    made.probe = add("probe", {"what": "losses"}, value=1.0)
    return made


def present(store):
    """What is in the store, as stage/key."""
    return {f"{a.stage}/{a.key}" for a in contents.artifacts(store)}


def test_ls(store, capsys):
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    for key in (store.stats, store.plan, store.score, store.run, store.track, store.lonely, store.probe):
        assert out.count(f"  {key}  ") == 1
    assert f"{store.plan}     1.9 kB" in out  # the file and the manifest
    assert "Tail removes [3]" in out
    assert "t a 0.5, n = 4, without layers [3]" in out
    assert "t a undefined" in out
    assert "demo: tiny tail none none 25 % seed 0" in out
    both = sum(f.stat().st_size for key in (store.plan, store.lonely) for f in (store.root / "plan" / key).iterdir())
    assert f"plan: 2, {both / 1000:.1f} kB" in out


def test_ls_filters(store, capsys):
    assert main(["ls", "stage=plan"]) == 0
    out = capsys.readouterr().out
    assert store.plan in out
    assert store.score not in out
    assert main(["ls", "filter=TAIL"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [store.plan, store.run]


def test_ls_of_many_shows_the_newest(store, capsys, monkeypatch):
    monkeypatch.setattr(contents, "SHOWN", 1)
    assert main(["ls"]) == 0
    assert "... 1 older ones (ls stage=plan shows all)" in capsys.readouterr().out


def test_show(store, capsys):
    assert main(["show", store.plan[:10]]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"plan/{store.plan}: Tail removes [3]\n")
    assert "intact" in out
    assert f"stats: {store.stats}" in out
    assert f"used by: run/{store.run}" in out
    (store.root / "plan" / store.plan / "data.bin").write_bytes(b"")
    assert main(["show", f"plan/{store.plan}"]) == 0
    assert "DAMAGED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["show", "zzz"], "has a key that begins with 'zzz'; `svl-report ls stage=run` lists them"),
        (["show"], "show needs 1 name: svl-report show KEY"),
        (["ls", "stage=plans"], "stage is 'plans', but must be one of:"),
        (["ls", "stage=plans"], "did you mean 'plan'?"),
        (["ls", "store=nowhere"], "there is no store"),
        (["gc", "store=nowhere"], "there is no store"),
        (["gc", "yes=please"], "yes is 'please', but must be one of: true, false"),
        (["gc", "older=old"], "older is 'old', but must be a number of days"),
        (["gc", "unreferencd=true"], "did you mean 'unreferenced'?"),
    ],
)
def test_mistakes_are_one_line(store, capsys, words, line):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_unknown_and_ambiguous_keys(store, capsys):
    wrong = store.run[:-1] + ("0" if store.run[-1] != "0" else "1")
    assert main(["show", wrong]) == 1
    assert f"did you mean '{store.run}'?" in capsys.readouterr().err
    (store.root / "plan" / (store.run[:5] + "f" * 11)).mkdir()
    assert main(["show", store.run[:5]]) == 1
    assert "is the beginning of 2 keys: plan/" in capsys.readouterr().err


def remains(store):
    """A half-written plan, scratch of a dead process, and a damaged score."""
    half, dead, own = (
        store.root / "tmp" / name
        for name in (f"plan-{'a' * 16}", f"served-{dead_process()}", f"together-{os.getpid()}")
    )
    for place in (half, dead, own):
        place.mkdir(parents=True)
        (place / "x").write_text("x")
        for path in (place / "x", place):
            os.utime(path, (YESTERDAY, YESTERDAY))
    with (store.root / "score" / store.score / "data.bin").open("ab") as file:
        file.write(b"more")
    return half, dead, own


def dead_process() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_gc_is_dry_unless_told(store, capsys):
    half, dead, own = remains(store)
    before = sorted(store.root.rglob("*"))
    assert main(["gc"]) == 0
    out = capsys.readouterr().out
    assert sorted(store.root.rglob("*")) == before
    assert f"tmp/{half.name}  1 B  half-written" in out
    assert f"tmp/{dead.name}" in out
    assert own.name not in out  # of a process that is alive
    assert f"score/{store.score}" in out
    assert "say yes=true" in out
    assert store.lonely not in out


def test_gc_removes_leftovers_only(store, capsys):
    half, dead, own = remains(store)
    intact = present(store) - {f"score/{store.score}"}
    assert main(["gc", "yes=true"]) == 0
    assert "removed: " in capsys.readouterr().out
    assert not half.exists()
    assert not dead.exists()
    assert own.exists()
    assert not (store.root / "score" / store.score).exists()
    assert present(store) == intact
    assert list((store.root / "lock").iterdir()) == []
    assert sorted(p.name for p in (store.root / "tmp").iterdir()) == [own.name]
    assert main(["gc"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_gc_keeps_what_runs_refer_to(store, capsys):
    everything = present(store)
    assert main(["gc", "unreferenced=true", "yes=true"]) == 0
    assert present(store) == everything  # too young: a sweep may be about to use it
    assert main(["gc", "unreferenced=true", "older=0", "yes=true"]) == 0
    gone = {f"plan/{store.lonely}", f"score/{store.unused}", f"track/{store.orphan}"}
    assert present(store) == everything - gone
    (store.root / "run" / store.run / "manifest.json").unlink()  # a damaged run refers to nothing
    assert main(["gc", "unreferenced=true", "older=0", "yes=true"]) == 0
    assert present(store) == {f"probe/{store.probe}"}


def test_gc_spares_what_another_process_holds(store, capsys):
    half, *_ = remains(store)
    code = (
        "import sys, filelock\nlocks = [filelock.FileLock(p) for p in sys.argv[1:]]\n"
        "[lock.acquire() for lock in locks]\nprint('held', flush=True)\nsys.stdin.read()"
    )
    held = [store.root / "lock" / name for name in (half.name, f"score-{store.score}")]
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        for words in (["gc"], ["gc", "yes=true"]):
            assert main(words) == 0
            assert "4 kept: another process is at work on them" in capsys.readouterr().out
            assert half.exists()
            assert (store.root / "score" / store.score).exists()
            assert {p.name for p in held} <= {p.name for p in (store.root / "lock").iterdir()}
        assert process.stdin
        process.stdin.close()
    assert main(["gc", "yes=true"]) == 0
    assert not half.exists()


def test_a_removed_lock_excludes_nobody_twice(store):
    """Who waits for a lock whose file is removed must not hold it beside the next one."""
    file = store.root / "lock" / f"score-{store.unused}"
    folder = store.root / "score" / store.unused
    assert contents.remove(store, contents.Leftover(folder, "", folder.exists))
    assert not file.exists()
    with FileLock(file), contents._held(file) as ours:
        assert not ours


def test_gc_does_not_remove_what_became_whole(store):
    """Between looking and removing, another process may have computed a damaged artifact again."""
    remains(store)
    damaged = next(left for left in contents.leftovers(store, False, 1) if left.why == "damaged")
    file = damaged.path / "data.bin"
    file.write_bytes(file.read_bytes()[:-4])
    assert not contents.remove(store, damaged)
    assert store.read(damaged.path)


def test_damaged_manifests_are_not_listed(store, capsys):
    manifest = store.root / "plan" / store.plan / "manifest.json"
    for text in ("{", "[]", json.dumps({"files": 3})):
        manifest.write_text(text)
        assert f"plan/{store.plan}" not in present(store)
        assert main(["show", store.plan]) == 1
        assert "is damaged" in capsys.readouterr().err


def test_ls_into_a_closed_pipe(store):
    code = "import sys; from svl.report import main; sys.exit(main(['ls']))"
    done = subprocess.run(
        f"'{sys.executable}' -c \"{code}\" | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_units():
    assert [size(n) for n in (0, 999, 1000, 1234567, 123456789, 2e13)] == [
        "0 B", "999 B", "1.0 kB", "1.2 MB", "123 MB", "20.0 TB",
    ]  # fmt: skip
    assert [period(s) for s in (-1, 5, 119, 120, 7200, 200000)] == ["0 s", "5 s", "119 s", "2 min", "2 h", "2 d"]


def test_store_that_is_a_file(tmp_path, capsys):
    Path(tmp_path / "file").touch()
    assert main(["ls", f"store={tmp_path / 'file'}"]) == 1
    assert "there is no store" in capsys.readouterr().err
