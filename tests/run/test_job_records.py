"""What a sweep knows of its jobs at its end."""

from __future__ import annotations

import json

from svl.run import job_records


def result(ratio: float, n_remove: int = 4, **others) -> dict:
    names = {"model": "m", "strategy": "tail", "selector": None, "compensation": "none", "recovery": "none"}
    return {
        **names,
        "seed": 0,
        "settings": {},
        "ratio": ratio,
        "n_remove": n_remove,
        "plan": {"n_layers": 16},
        **others,
    }


def test_failures_are_listed_in_the_order_of_jobs_wherever_their_folders_are(tmp_path):
    job_records.record_failure(tmp_path, 10, tmp_path / "a" / "b" / "x=1", "too\nlong")
    job_records.record_failure(tmp_path, 2, tmp_path / "2", "ratio is 2")
    job_records.record_result(tmp_path, 1, tmp_path / "1", result(0.25))
    assert job_records.describe_failures(tmp_path, None).splitlines() == [
        "2 jobs failed (each folder has failed.txt and run.log):",
        f"  {tmp_path}/2: ratio is 2",
        f"  {tmp_path}/a/b/x=1: too long",
    ]


def test_jobs_that_did_not_end_are_failures(tmp_path):
    job_records.record_result(tmp_path, 0, tmp_path / "0", result(0.25))
    assert job_records.describe_failures(tmp_path, 3).splitlines() == [
        "2 of 3 jobs failed (each folder has failed.txt and run.log):",
        "  jobs 1, 2 did not end: killed, or not started",
    ]
    assert job_records.describe_failures(tmp_path, 1) is None


def test_an_earlier_start_in_the_same_folder_is_forgotten(tmp_path):
    job_records.record_failure(tmp_path, 0, tmp_path / "0", "old")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "failed.txt").write_text("old")
    (tmp_path / "0" / "result.json").write_text('{"torn')
    job_records.clear_records(tmp_path)
    assert job_records.read_records(tmp_path) == []
    assert (tmp_path / "0" / "failed.txt").exists()


def test_reasons_hold_no_secret(tmp_path):
    job_records.record_failure(tmp_path, 0, tmp_path / "0", "no answer of http://me:hunter2@host")
    assert "hunter2" not in (tmp_path / job_records.FOLDER / "0.json").read_text()


def test_ratios_of_the_same_layers_are_pointed_out_once(tmp_path):
    ratios = [0.25, 0.26, 0.125, 0.25]
    for number, ratio in enumerate(ratios):
        other = {"n_remove": 2} if ratio == 0.125 else {}
        job_records.record_result(tmp_path, number, tmp_path / str(number), result(ratio, **other))
    job_records.record_result(tmp_path, 9, tmp_path / "9", result(0.27, seed=1))
    assert job_records.equal_ratios(tmp_path) == [
        "ratios 0.25, 0.26 are the same 4 of 16 layers of m, so they were evaluated once"
    ]
    assert json.loads((tmp_path / job_records.FOLDER / "9.json").read_text())["ratio"] == 0.27
