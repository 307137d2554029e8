"""How long a sweep will take: from what its jobs did, not from how many were started."""

from __future__ import annotations

import pytest

from svl.run.job_records import JobRecord, clear_records, record_failure
from svl.run.time_left import Progress, read_progress, start_job, write_jobs


def ended(number: int, own: float | None = None, shared: float = 0.0) -> JobRecord:
    return JobRecord(number, "folder", work=None if own is None else (own, shared))


def test_shared_work_is_counted_once():
    """Twelve jobs on one model: the first also calibrates (100 s), each then takes 10 s."""
    after_first = Progress(["a"] * 12, {0: 0.0, 1: 110.0}, [ended(0, own=10, shared=100)])
    assert after_first.seconds_left(now=110) == 11 * 10
    assert after_first.place_of(1, now=110) == "[2/12, about 2 min left] "


def test_another_model_has_shared_work_to_come():
    jobs = Progress(["a", "a", "b", "b"], {0: 0.0, 1: 110.0}, [ended(0, own=10, shared=100)])
    assert jobs.seconds_left(now=110) == 10 + 2 * 10 + 100


def test_jobs_that_found_everything_stored_promise_nothing():
    again = Progress(["a"] * 4, {0: 0.0, 1: 1.0, 2: 2.0}, [ended(0), ended(1)])
    assert again.seconds_left(now=2) is None
    assert again.place_of(2, now=2) == "[3/4] "
    assert Progress(["a"] * 4, {0: 0.0, 1: 1.0, 2: 41.0}, [ended(0), ended(1, own=40)]).seconds_left(now=41) == 80


def test_jobs_that_started_at_once_are_not_done():
    """Four of eight at once, as joblib, submitit and Ray start them: none has ended, so nothing is known."""
    at_once = Progress(["a"] * 8, dict.fromkeys(range(4), 0.0), [])
    assert at_once.place_of(3, now=0) == "[4/8, 0 done] "
    one_ended = Progress(["a"] * 8, {**dict.fromkeys(range(4), 0.0), 4: 40.0}, [ended(2, own=40)])
    # three that should be ending, the one that starts, and three that wait, by four at a time
    assert one_ended.seconds_left(now=40) == (0 + 40 + 3 * 40) / 4
    assert one_ended.place_of(4, now=40) == "[5/8, 1 done, about 40 s left] "


def test_a_search_has_no_known_number_of_jobs():
    assert Progress(None, {0: 0.0}, [ended(0, own=5)]).place_of(1, now=9) == "[2] "


def test_every_process_reads_it_from_the_folder(tmp_path):
    write_jobs(tmp_path, [{"model": {"path": "x"}}, {"model": {"path": "x"}}, {"model": {"path": "y"}}])
    assert start_job(tmp_path, 0) == "[1/3] "
    record_failure(tmp_path, 0, tmp_path, "broken")
    assert start_job(tmp_path, 1) == "[2/3] "
    seen = read_progress(tmp_path)
    assert seen.shares[0] == seen.shares[1] != seen.shares[2]
    assert (sorted(seen.started), [record.number for record in seen.ended]) == ([0, 1], [0])
    clear_records(tmp_path)
    assert read_progress(tmp_path) == Progress(None, {}, [])


@pytest.mark.parametrize("now", [0.0, 1e9])
def test_it_is_never_negative(now):
    assert Progress(["a", "a"], {0: 0.0, 1: 5.0}, [ended(0, own=5)]).seconds_left(now) >= 0
