"""What a run says of its stages."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from svl.run.pipeline import tell_notes
from svl.run.stages import StageLog


def entry(reused: bool = False, work: float = 0.0):
    return SimpleNamespace(reused=reused, output={"work": work})


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "svl")
    return lambda: [" ".join(record.getMessage().split()) for record in caplog.records]


def test_stored_stages_are_one_line_in_their_place(told):
    log = StageLog()
    log.stage("calibrate", entry(reused=True), "64 samples", shared=True)
    log.stage("plan", entry(reused=True), "removes layers [3], 1 in all, in 2 passes", brief="removes layers [3]")
    assert told() == []  # until something is computed, or the run ends
    log.flush()
    log.stage("evaluate", entry(work=12.34), "dense: task accuracy 1.000", shared=True)
    log.stage("evaluate", entry(reused=True), "x", brief="a 0.5")
    log.stage("evaluate", entry(reused=True), "y", brief="b 0.7")
    log.flush()
    log.flush()
    assert told() == [
        "stored calibrate, plan: removes layers [3]",
        "evaluate 12.3 s dense: task accuracy 1.000",
        "stored 2 x evaluate: a 0.5; b 0.7",
    ]


def test_work_is_shared_or_a_runs_own():
    log = StageLog()
    log.stage("calibrate", entry(work=5.0), shared=True)
    log.stage("plan", entry(reused=True, work=9.0))
    assert (log.shared, log.computed) == (5.0, False)
    log.stage("plan", entry(work=1.0))
    assert (log.shared, log.computed) == (5.0, True)


@pytest.mark.parametrize(("count", "shown"), [(4, ["0", "1", "2", "3"]), (5, ["0 (4 more in run.log)"])])
def test_of_many_notes_the_console_has_the_first_and_run_log_all(count, shown, caplog):
    caplog.set_level(logging.INFO)
    tell_notes([str(note) for note in range(count)])
    console = [r.getMessage() for r in caplog.records if r.name.startswith("svl.")]
    assert console == [f"  compensation: {note}" for note in shown]
    everything = " ".join(record.getMessage() for record in caplog.records).split()
    assert {str(note) for note in range(count)} <= set(everything)
