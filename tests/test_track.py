"""Trackers: a real offline W&B run read back record by record, and W&B failing in every way it can."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B reads it when imported; tests use no network
import wandb
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from svl.core import SvlError
from svl.track import NullTracker, Tracker, WandbTracker, summary

RESULT: dict[str, Any] = {
    "ratio": 0.25,
    "n_remove": 1,
    "plan": {"n_layers": 4, "removed": [2], "kept": [0, 1, 3], "importance": [0.9, 0.3, 0.1, 0.5]},
    "cost": {"params": 6, "params_dense": 8, "layers": 3, "samples_per_second": None},
    "scores": {
        "yes": {"metric": "accuracy", "n": 9, "metrics": {"accuracy": {"value": 0.75}, "f1": {"value": 0.5}}},
        "no": {"metric": "accuracy", "n": 9, "metrics": {"accuracy": {"value": 0.25}, "f1": {"value": None}}},
    },
    "average": {"value": 0.5, "stderr": 0.1, "dense": 0.8},
    "retained": {"value": 0.625, "stderr": None},
    "seconds": {"calibrate": 1.5, "total": 4.0},
}
NUMBERS = {
    "eval/yes/accuracy": 0.75,
    "eval/yes/f1": 0.5,
    "eval/no/accuracy": 0.25,
    "eval/average": 0.5,
    "eval/retained": 0.625,
    "cost/params": 6,
    "cost/params_dense": 8,
    "cost/layers": 3,
    "prune/ratio": 0.25,
    "prune/n_remove": 1,
    "seconds/calibrate": 1.5,
    "seconds/total": 4.0,
}
CONFIG = {"strategy": {"name": "short_lvlm", "top": [1, 2]}, "ratio": 0.25}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """W&B's own folders under the test's, and no settings of the person who runs the tests."""
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    for name in ("WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def warnings(caplog):
    """Messages of svl.track, read when called."""

    def messages():
        mine = [record for record in caplog.records if record.name == "svl.track"]
        assert {record.levelno for record in mine} <= {logging.WARNING}
        return [record.getMessage() for record in mine]

    return messages


def start(tracker, folder, key="0123456789abcdef"):
    """Start a run."""
    tracker.start(CONFIG, name="tiny-short_lvlm-r0.25", group="demo", tags=["t" * 99, "b"], key=key, folder=folder)


def read(location):
    """All records of an offline run, by kind. Ends W&B's background process first, which writes them."""
    wandb.teardown()
    (file,) = Path(location).glob("*.wandb")
    log = DataStore()
    log.open_for_scan(str(file))
    records: dict[str, list[Any]] = {}
    while (data := log.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        records.setdefault(kind, []).append(getattr(record, kind))
    log.close()
    return records


def summary_of(records):
    """The run's summary as W&B will show it."""
    values: dict[str, Any] = {}
    for record in records["summary"]:
        values |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.update}
    return values


def test_summary():
    assert summary(RESULT) == NUMBERS
    unscored = {"scores": {}, "average": None, "retained": None, "cost": {"layers": 3}}
    assert summary(RESULT | unscored).keys() == {n for n in NUMBERS if not n.startswith(("eval", "cost"))} | {
        "cost/layers"
    }


def test_offline_run_holds_everything(tmp_path, capfd, warnings):
    Image.new("RGB", (3, 2)).save(tmp_path / "importance.png")
    tracker: Tracker = WandbTracker(project="p")
    assert tracker.location is None
    start(tracker, tmp_path / "new" / "run")
    tracker.log(RESULT, {"importance": tmp_path / "importance.png"})
    tracker.finish(ok=True)
    tracker.finish(ok=True)
    assert not warnings()
    assert capfd.readouterr() == ("", "")  # W&B says nothing on the terminal

    place = Path(tracker.location or "")
    assert place.parent == tmp_path / "new" / "run" / "wandb"
    records = read(place)
    run = records["run"][0]
    assert (run.run_id, run.project, run.run_group, run.job_type) == ("0123456789abcdef", "p", "demo", "prune")
    assert (run.display_name, list(run.tags)) == ("tiny-short_lvlm-r0.25", ["t" * 64, "b"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: config[name] for name in CONFIG} == CONFIG

    found = summary_of(records)
    assert {name: found.get(name) for name in NUMBERS} == NUMBERS
    assert not {"layer", "layers/importance", "layers/removed"} & set(found)  # a curve has no single value

    steps = {metric.glob_name: metric.step_metric for metric in records["metric"] if metric.glob_name}
    assert steps == {"layers/*": "layer"}
    history = [{i.nested_key[0]: i.value_json for i in record.item} for record in records["history"]]
    curve = [
        [json.loads(h[k]) for k in ("layer", "layers/importance", "layers/removed")] for h in history if "layer" in h
    ]
    assert curve == [[0, 0.9, 0], [1, 0.3, 0], [2, 0.1, 1], [3, 0.5, 0]]

    files = place / "files"
    (table,) = files.rglob("*.table.json")
    body = json.loads(table.read_text())
    assert body["columns"] == ["layer", "importance", "removed"]
    assert body["data"][2] == [2, 0.1, True]
    assert len(list(files.rglob("figures/importance*.png"))) == 1

    (plan,) = (artifact for artifact in records["artifact"] if artifact.type == "plan")
    (content,) = plan.manifest.contents
    assert content.path == "plan.json"
    assert Path(content.local_path).is_relative_to(place)  # still there when the run is uploaded
    assert json.loads(Path(content.local_path).read_text()) == RESULT["plan"]
    assert records["exit"][0].exit_code == 0


def test_runs_of_one_process_stay_apart(tmp_path):
    """Jobs of a sweep follow each other in one process, also after one that failed; a strategy may lack importance."""
    bare = RESULT | {"plan": RESULT["plan"] | {"importance": []}}
    places = []
    for i, ok in enumerate((False, True)):
        tracker = WandbTracker()
        start(tracker, tmp_path / str(i), key=f"key{i}")
        tracker.log(bare)
        tracker.finish(ok)
        places.append(tracker.location)
    assert len(set(places)) == 2
    for place, code in zip(places, (1, 0), strict=True):
        records = read(place)
        assert records["exit"][0].exit_code == code
        assert summary_of(records)["eval/average"] == 0.5


def broken(*args, **kwargs):
    """Any part of W&B on a bad day."""
    raise OSError("No space left\non device")


def test_failing_init_warns_once(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(wandb, "init", broken)
    tracker = WandbTracker()
    start(tracker, tmp_path)
    tracker.log(RESULT)
    tracker.finish(ok=True)
    assert tracker.location is None
    (message,) = warnings()
    assert message.startswith("W&B failed to start")
    assert message.endswith("No space left on device")


def test_failing_log_keeps_the_numbers(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(wandb, "Table", broken)
    tracker = WandbTracker()
    start(tracker, tmp_path)
    run = tracker._run
    place = tracker.location
    tracker.log(RESULT)
    tracker.log(RESULT)
    tracker.finish(ok=True)
    assert tracker.location is None
    run.finish()  # W&B does it at the end of the process
    assert [message.startswith("W&B failed to log") for message in warnings()] == [True]
    assert summary_of(read(place))["eval/average"] == 0.5


def test_failing_finish_and_missing_wandb(tmp_path, monkeypatch, warnings):
    tracker = WandbTracker()
    start(tracker, tmp_path)
    run = tracker._run
    with monkeypatch.context() as patch:
        patch.setattr(type(run), "finish", broken)
        tracker.finish(ok=True)
    run.finish()
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(WandbTracker(), tmp_path)
    assert [message.split(",")[0] for message in warnings()] == ["W&B failed to finish", "W&B failed to start"]


def test_no_login_is_a_warning_not_a_question(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracker = WandbTracker(mode="online")
    start(tracker, tmp_path)
    assert ["No API key configured" in message for message in warnings()] == [True]


def test_environment_chooses_the_mode(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = WandbTracker(mode="online")
    start(tracker, tmp_path)
    tracker.log(RESULT)
    tracker.finish(ok=True)
    assert tracker.location is None
    assert not warnings()
    assert not list(tmp_path.rglob("*.wandb"))


def test_unknown_mode():
    with pytest.raises(SvlError, match="did you mean 'offline'"):
        WandbTracker(mode="ofline")


def test_null_tracker(tmp_path):
    tracker: Tracker = NullTracker()
    start(tracker, tmp_path)
    tracker.log(RESULT)
    tracker.finish(ok=False)
    assert tracker.location is None
    assert not list(tmp_path.iterdir())
