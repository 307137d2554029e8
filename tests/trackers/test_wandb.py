"""Real W&B runs, read back record by record or uploaded to a server on this machine, and all the ways they fail in."""

import dataclasses
import json
import os
import re
import time
from pathlib import Path

import pytest
import wandb
from helpers.paths import ROOT
from helpers.records import CONFIG, CURVES, FLIPS, NUMBERS, PLAN, RESULT, TRAINING, read_offline_run, summary_of
from helpers.wandb_endpoint import Endpoint

from svl.core import SvlError
from svl.trackers import wandb as wandb_tracker
from svl.trackers.record import Record
from svl.trackers.wandb import Wandb


@pytest.fixture
def server(monkeypatch):
    """A W&B server."""
    endpoint = Endpoint()
    monkeypatch.setenv("WANDB_BASE_URL", endpoint.url)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    yield endpoint
    endpoint.close()


def test_offline_run_holds_everything(record, capfd):
    place = Path(Wandb(project="p", tags=("mine",)).mirror(record) or "")
    assert capfd.readouterr() == ("", "")  # W&B says nothing on the terminal
    assert place.parent == record.folder / "wandb"
    assert place.name.startswith("offline-run-")
    records = read_offline_run(place)
    run = records["run"][0]
    assert (run.run_id, run.project, run.run_group, run.job_type) == ("0123456789abcdef", "p", "demo", "prune")
    assert (run.display_name, list(run.tags)) == (record.name, ["model:" + "t" * 58, "mine"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: config[name] for name in CONFIG} == CONFIG

    found = summary_of(records)
    assert {name: found.get(name) for name in NUMBERS} == NUMBERS
    assert not {"layer", "layers/importance", "layers/removed"} & set(found)  # a curve has no single value

    steps = {metric.glob_name: metric.step_metric for metric in records["metric"] if metric.glob_name}
    assert steps == {"layers/*": "layer", "recover/*": "recover/step"}
    history = [{i.nested_key[0]: i.value_json for i in stored.item} for stored in records["history"]]
    curves = [
        {k: json.loads(h[k]) for k in ("layer", *(f"layers/{c}" for c in CURVES))} for h in history if "layer" in h
    ]
    assert curves[2] == {"layer": 2, "layers/removed": 1, "layers/importance": 0.1, "layers/cosine": 0.9}
    assert len(curves) == 4
    training = [{k: json.loads(h[f"recover/{k}"]) for k in TRAINING[0]} for h in history if "recover/step" in h]
    assert training == TRAINING

    tables = {p.name.split("_")[0]: json.loads(p.read_text()) for p in (place / "files").rglob("*.table.json")}
    assert tables["layers"]["columns"] == ["layer", *CURVES]
    assert tables["layers"]["data"][2] == [2, 1, 0.1, 0.9]
    assert tables["flips"] | {"data": tables["flips"]["data"]} == tables["flips"]
    assert dict(zip(tables["flips"]["columns"], tables["flips"]["data"][0], strict=True)) == FLIPS[0]
    assert len(list((place / "files").rglob("figures/importance*.png"))) == 1

    files = {a.type: [c.path for c in a.manifest.contents] for a in records["artifact"]}
    assert files["plan"] == ["plan.json"]
    assert sorted(files["report"]) == ["flips.md", "result.json"]
    kept = [
        Path(c.local_path) for a in records["artifact"] if a.type in ("plan", "report") for c in a.manifest.contents
    ]
    assert all(path.is_relative_to(place) and path.is_file() for path in kept)  # still there when the run is uploaded
    assert records["exit"][0].exit_code == 0


def test_upload_to_a_server(record, server):
    """Everything arrives, and the run's own files stay, which W&B deletes after their upload if it is given them."""
    failed = Record(
        key="failed-1", name="x", group="demo", kind="prune", tags=[], config=CONFIG, folder=record.folder / "2",
        error="SvlError: no",
    )  # fmt: skip
    online = Wandb(mode="online")
    assert online.mirror(record) == f"{server.url}/lab/short-lvlm/runs/{record.key}"
    assert online.mirror(failed) == f"{server.url}/lab/short-lvlm/runs/failed-1"
    assert server.unknown == []
    assert server.codes == {record.key: 0, "failed-1": 1}
    said, found = server.runs[record.key], server.summary(record.key)
    assert (said["groupName"], said["displayName"], said["jobType"]) == ("demo", record.name, "prune")
    assert json.loads(said["config"])["strategy"]["value"] == CONFIG["strategy"]
    assert {name: found.get(name) for name in NUMBERS} == NUMBERS
    assert server.summary("failed-1")["error"] == "SvlError: no"
    assert [h["layers/cosine"] for h in server.history(record.key) if "layer" in h] == CURVES["cosine"]
    sent = {a["artifactTypeName"]: f"artifact{i}" for i, a in enumerate(server.artifacts)}
    assert json.loads(server.uploads[f"{sent['plan']}/plan.json"]) == PLAN
    assert json.loads(server.uploads[f"{sent['report']}/result.json"]) == RESULT
    assert server.uploads[f"{sent['report']}/flips.md"] == b"# Flips"
    assert all(file.is_file() for files in record.files.values() for file in files)


def test_lost_server_takes_no_longer_than_its_time(record, server, monkeypatch):
    upload, left = wandb_tracker.upload, []

    def upload_impatiently(folder: Path, seconds: float) -> str:
        left.append(seconds)
        return upload(folder, 2.0)

    monkeypatch.setattr(wandb_tracker, "upload", upload_impatiently)
    server.close()
    with pytest.raises(OSError, match=r"did not take the run in 2 s; later: wandb sync /.*/offline-run-.*abcdef"):
        Wandb(mode="online", timeout=500.0).mirror(record)
    assert 1 <= left[0] < 500  # what writing has left
    (place,) = record.folder.glob("wandb/offline-run-*")
    assert summary_of(read_offline_run(place))["eval/average"] == 0.5


def test_no_login_is_an_error_not_a_question(record):
    with pytest.raises(OSError, match="No API key configured"):
        Wandb(mode="online").mirror(record)


def test_runs_of_one_process_stay_apart(record, tmp_path):
    """Jobs of a sweep follow each other in one process, also after one that failed; a strategy may lack importance."""
    bare = dataclasses.replace(record, curves={}, flips=(), error=None)
    failed = dataclasses.replace(bare, key="key1", folder=tmp_path / "1", error="ValueError: no")
    places = [Wandb().mirror(run) for run in (failed, bare)]
    assert len(set(places)) == 2
    for place, code in zip(places, (1, 0), strict=True):
        records = read_offline_run(place)
        assert records["exit"][0].exit_code == code
        assert summary_of(records)["eval/average"] == 0.5


def test_numbers_come_first(record):
    gone = dataclasses.replace(record, files={"plan": [record.folder / "gone.json"]})
    with pytest.raises(OSError, match=r"No such file.*gone\.json"):
        Wandb().mirror(gone)
    (place,) = record.folder.glob("wandb/offline-run-*")
    records = read_offline_run(place)
    assert summary_of(records)["eval/average"] == 0.5
    assert "exit" in records  # the run is closed all the same


def test_environment_chooses_the_mode(record, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Wandb(mode="online").mirror(record) is None
    assert not list(record.folder.rglob("*.wandb"))
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(SvlError, match=r"WANDB_MODE is 'ofline'.*did you mean 'offline'"):
        Wandb().check()
    with pytest.raises(SvlError, match="did you mean 'offline'"):
        Wandb(mode="ofline")


def test_older_names_of_modes_count(record, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    Wandb(mode="online").check()
    assert Path(Wandb(mode="online").mirror(record) or "").name.startswith("offline-run-")


@pytest.mark.parametrize("project", ["", "a/b", "50 %", "a:b", "#1", "why?", "x" * 129])
def test_names_of_projects_that_wandb_refuses_are_found_before_any_work(project):
    with pytest.raises(SvlError, match=r"tracker.project is '.*', but W&B takes names"):
        Wandb(project=project).check()
    with pytest.raises(wandb.errors.UsageError):
        wandb.Settings(project=project or "/")
    Wandb(project="x" * 128).check()


def test_workspace_shows_what_runs_have(record, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from wandb_workspace import workspace

    model = workspace("lab")._to_model()
    text = model.model_dump_json(by_alias=True)
    names = set(re.findall(r'"(?:summary:)?((?:eval|cost|prune|layers)/[^"]+)"', text))
    assert len(names) >= 6
    assert names <= {*record.summary(), *(f"layers/{name}" for name in CURVES)}


def test_a_client_of_wandb_that_hangs_is_ended_with_all_it_started(record, tmp_path, monkeypatch):
    """Also offline: the library is replaced by one that starts a process and waits for ever."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "wandb.py").write_text(
        "import os, pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(tmp_path / 'pids')!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(wandb_tracker, "SOURCES", os.pathsep.join([str(fake), str(ROOT)]))
    with pytest.raises(OSError, match=r"did not end within 5 s \(tracker.timeout\)"):
        Wandb(timeout=5.0).mirror(record)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]

    def are_alive() -> bool:  # the command line of one that has ended is empty
        files = [Path(f"/proc/{pid}/cmdline") for pid in pids]
        return any(file.exists() and file.read_bytes() for file in files)

    for _ in range(500):  # the kernel takes its time on a busy machine
        if not are_alive():
            break
        time.sleep(0.01)
    assert not are_alive()
