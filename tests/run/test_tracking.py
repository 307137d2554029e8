"""What trackers are handed: names of their own for different runs; no failure of a tracker costs a result."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
from helpers.commands import QUIET, run_svl

TRACKER = """
    import json
    import time
    from dataclasses import dataclass

    from svl.core import SvlError
    from svl.trackers.record import Record, Tracker


    @dataclass(frozen=True)
    class Listing(Tracker):
        mood: str = "good"

        def check(self) -> None:
            if self.mood == "missing":
                raise SvlError("there is no such tracker")

        def mirror(self, record: Record) -> str | None:
            if self.mood == "broken":
                raise OSError("no disk")
            with open("names.txt", "a") as file:
                file.write(json.dumps([record.key, record.name]) + "\\n")
            return None
"""
WORDS = (
    *[word for word in QUIET if not word.startswith("tracker")],
    "tracker=none",
    "tracker._target_=listing.x.Listing",
)


@pytest.fixture(autouse=True)
def _forget_plugins(monkeypatch):
    """Each test's plugin lies in a folder of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "listing"]:
        del sys.modules[name]


def run(tmp_path, *words: str, code: int = 0):
    (tmp_path / "listing").mkdir(exist_ok=True)
    (tmp_path / "listing" / "x.py").write_text(textwrap.dedent(TRACKER))
    return run_svl(*words, *WORDS, cwd=tmp_path, code=code, SVL_PLUGINS="./listing")


def names(tmp_path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "names.txt").read_text().splitlines()]


def test_runs_of_other_seeds_and_settings_have_other_names(tmp_path):
    run(tmp_path, "-m", "strategy=random", "seed=1,2", "n_remove=2")
    run(tmp_path, "-m", "strategy=shortgpt", "calibration.samples=2,3", "n_remove=2")
    found = [name for _, name in names(tmp_path)]
    assert len(set(found)) == 4
    assert [name.rpartition("-")[0] for name in found] == [
        "demo_lvlm-random-r0.125-data-free-seed=1",
        "demo_lvlm-random-r0.125-data-free-seed=2",
        "demo_lvlm-shortgpt-r0.125-all-samples=2",
        "demo_lvlm-shortgpt-r0.125-all-samples=3",
    ]
    assert [name.rpartition("-")[2] for name in found] == [key[:4] for key, _ in names(tmp_path)]


def test_a_broken_tracker_costs_no_result_and_is_given_the_run_again(tmp_path):
    broken = run(tmp_path, "strategy=tail", "tracker.mood=broken")
    assert "the run is stored, but not tracked; running it again tracks it" in broken.stdout
    assert list(tmp_path.rglob("result.json"))
    again = run(tmp_path, "strategy=tail", "tracker.mood=broken")
    assert "not tracked" in again.stdout
    run(tmp_path, "strategy=tail")
    run(tmp_path, "strategy=tail")
    assert len(names(tmp_path)) == 1


def test_a_tracker_that_cannot_work_is_refused_before_any_work(tmp_path):
    done = run(tmp_path, "strategy=tail", "tracker.mood=missing", code=1)
    assert done.stderr.splitlines() == ["error: there is no such tracker"]
    assert "loaded" not in done.stdout
