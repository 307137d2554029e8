"""Trackers: real W&B runs read back record by record and uploaded to a server on this machine, a real MLflow database,
and both failing in every way they can.
"""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from wandb_endpoint import Endpoint

os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B reads it when imported; tests use no network
import wandb
from wandb.proto.wandb_internal_pb2 import Record as Stored
from wandb.sdk.internal.datastore import DataStore

from svl import pipeline
from svl.core import SvlError
from svl.record import Record, flat
from svl.trackers import wandb as tracker_file
from svl.trackers.mlflow import Mlflow
from svl.trackers.none import Nowhere
from svl.trackers.wandb import Wandb

PLAN = {"n_layers": 4, "removed": [2], "kept": [0, 1, 3], "importance": [0.9, 0.3, 0.1, 0.5]}
RESULT: dict[str, Any] = {
    "name": "demo",
    "seed": 7,
    "limit": None,
    "ratio": 0.26,
    "n_remove": 1,
    "plan": PLAN,
    "cost": {"params": 6, "params_dense": 8, "layers": 3, "samples_per_second": None},
    "scores": {
        "yes": {
            "metric": "accuracy",
            "n": 9,
            "metrics": {
                "accuracy": {"value": 0.75, "stderr": 0.15, "dense": 0.875},
                "f1": {"value": 0.55, "stderr": None, "dense": 0.65},
            },
            "change": {"agreement": 0.45, "gained": 11, "lost": 12, "p": 0.05},
        },
        "no": {"metric": "accuracy", "n": 10, "metrics": {"accuracy": {"value": 0.25, "stderr": 0.35, "dense": 0.85}},
               "change": None},
    },
    "average": {"value": 0.5, "stderr": 0.1, "dense": 0.8},
    "retained": {"value": 0.625, "stderr": 0.02},
    "efficiency": {"dense": {"seconds": {"total": 2.5}}, "speedup": {"total": {"value": 1.25, "low": 1.125}}},
    "seconds": {"calibrate": 1.5, "total": 4.0},
}  # fmt: skip
NUMBERS = {
    "eval/yes/accuracy": 0.75, "eval/yes/f1": 0.55, "eval/no/accuracy": 0.25, "eval/average": 0.5,
    "eval/retained": 0.625, "stderr/yes/accuracy": 0.15, "stderr/no/accuracy": 0.35, "stderr/average": 0.1,
    "stderr/retained": 0.02, "dense/yes/accuracy": 0.875, "dense/yes/f1": 0.65, "dense/no/accuracy": 0.85,
    "dense/average": 0.8, "samples/yes": 9, "samples/no": 10, "change/yes/agreement": 0.45, "change/yes/gained": 11,
    "change/yes/lost": 12, "change/yes/p": 0.05, "cost/params": 6, "cost/params_dense": 8, "cost/layers": 3,
    "efficiency/dense/seconds/total": 2.5, "efficiency/speedup/total": 1.25, "efficiency/speedup/total/low": 1.125,
    "prune/ratio": 0.26, "prune/n_remove": 1, "prune/seed": 7, "seconds/calibrate": 1.5, "seconds/total": 4.0,
}  # fmt: skip
CONFIG = {"strategy": {"name": "short_lvlm", "top": [1, 2]}, "ratio": 0.25}
CURVES = {"removed": [0, 0, 1, 0], "importance": PLAN["importance"], "cosine": [0.1, 0.7, 0.9, 0.5]}
FLIPS = [{"task": "yes", "no": 3, "question": "Is it?", "expected": "yes", "dense": "no", "pruned": "yes"}]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """W&B's own folders under the test's, and no settings of the person who runs the tests."""
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    for name in ("WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def server(monkeypatch):
    """A W&B server."""
    endpoint = Endpoint()
    monkeypatch.setenv("WANDB_BASE_URL", endpoint.url)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    yield endpoint
    endpoint.close()


@pytest.fixture
def record(tmp_path):
    """A finished run."""
    folder = tmp_path / "new" / "run"
    folder.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(folder / "importance.png")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "flips.md").write_text("# Flips")
    return Record(
        key="0123456789abcdef", name="tiny-short_lvlm-r0.25", group="demo", kind="prune", tags=["model:" + "t" * 99],
        config=CONFIG, folder=folder, result=RESULT, curves=CURVES, flips=FLIPS,
        figures={"importance": folder / "importance.png"},
        files={"plan": [folder / "plan.json"], "report": [folder / "result.json", folder / "flips.md"]},
    )  # fmt: skip


def read(location):
    """All records of an offline run, by kind. Ends W&B's background process first, which writes them."""
    wandb.teardown()
    (file,) = Path(location).glob("*.wandb")
    log = DataStore()
    log.open_for_scan(str(file))
    records: dict[str, list[Any]] = {}
    while (data := log.scan_data()) is not None:
        stored = Stored()
        stored.ParseFromString(data)
        kind = stored.WhichOneof("record_type")
        records.setdefault(kind, []).append(getattr(stored, kind))
    log.close()
    return records


def summary_of(records):
    """The run's summary as W&B will show it."""
    values: dict[str, Any] = {}
    for stored in records["summary"]:
        values |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in stored.update}
    return values


# ----------------------------------------------------------------------------------------------- record


def test_summary_has_every_number_of_a_result(record):
    assert record.summary() == NUMBERS
    leaves = [value for name, value in flat(RESULT) if isinstance(value, int | float) and not name.startswith("plan/")]
    assert sorted(leaves) == sorted(NUMBERS.values())
    unscored = {"scores": {}, "average": None, "retained": None, "cost": {"layers": 3}, "efficiency": None}
    names = dataclasses.replace(record, result=RESULT | unscored).summary().keys()
    assert names == {n for n in NUMBERS if n.startswith(("prune", "seconds"))} | {"cost/layers"}
    assert dataclasses.replace(record, result={}).summary() == {}


def test_layers(record):
    points = record.layers()
    assert points[2] == {"layer": 2, "removed": 1, "importance": 0.1, "cosine": 0.9}
    assert [point["layer"] for point in points] == [0, 1, 2, 3]
    assert dataclasses.replace(record, curves={}).layers() == []


# -------------------------------------------------------------------------------------- Weights & Biases


def test_offline_run_holds_everything(record, capfd):
    place = Path(Wandb(project="p", tags=("mine",)).mirror(record) or "")
    assert capfd.readouterr() == ("", "")  # W&B says nothing on the terminal
    assert place.parent == record.folder / "wandb"
    assert place.name.startswith("offline-run-")
    records = read(place)
    run = records["run"][0]
    assert (run.run_id, run.project, run.run_group, run.job_type) == ("0123456789abcdef", "p", "demo", "prune")
    assert (run.display_name, list(run.tags)) == (record.name, ["model:" + "t" * 58, "mine"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: config[name] for name in CONFIG} == CONFIG

    found = summary_of(records)
    assert {name: found.get(name) for name in NUMBERS} == NUMBERS
    assert not {"layer", "layers/importance", "layers/removed"} & set(found)  # a curve has no single value

    steps = {metric.glob_name: metric.step_metric for metric in records["metric"] if metric.glob_name}
    assert steps == {"layers/*": "layer"}
    history = [{i.nested_key[0]: i.value_json for i in stored.item} for stored in records["history"]]
    curves = [
        {k: json.loads(h[k]) for k in ("layer", *(f"layers/{c}" for c in CURVES))} for h in history if "layer" in h
    ]
    assert curves[2] == {"layer": 2, "layers/removed": 1, "layers/importance": 0.1, "layers/cosine": 0.9}
    assert len(curves) == 4

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
    server.close()
    monkeypatch.setattr(tracker_file, "PATIENCE", 6.0)
    with pytest.raises(OSError, match=r"did not take the run in 6 s; later: wandb sync /.*/offline-run-.*abcdef"):
        Wandb(mode="online").mirror(record)
    (place,) = record.folder.glob("wandb/offline-run-*")
    assert summary_of(read(place))["eval/average"] == 0.5


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
        records = read(place)
        assert records["exit"][0].exit_code == code
        assert summary_of(records)["eval/average"] == 0.5


def broken(*args, **kwargs):
    """Any part of W&B on a bad day."""
    raise OSError("No space left\non device")


def test_numbers_come_first(record, monkeypatch):
    monkeypatch.setattr(tracker_file, "table", broken)
    with pytest.raises(OSError, match="No space"):
        Wandb().mirror(record)
    (place,) = record.folder.glob("wandb/offline-run-*")
    records = read(place)
    assert summary_of(records)["eval/average"] == 0.5
    assert "exit" in records  # the run is closed all the same


def test_environment_chooses_the_mode(record, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Wandb(mode="online").mirror(record) is None
    assert not list(record.folder.rglob("*.wandb"))
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(SvlError, match=r"WANDB_MODE is 'ofline'.*did you mean 'offline'"):
        Wandb().mirror(record)
    with pytest.raises(SvlError, match="did you mean 'offline'"):
        Wandb(mode="ofline")


def test_workspace_shows_what_runs_have(record, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    from wandb_workspace import workspace

    model = workspace("lab")._to_model()
    text = model.model_dump_json(by_alias=True)
    names = set(re.findall(r'"(?:summary:)?((?:eval|cost|prune|layers)/[^"]+)"', text))
    assert len(names) >= 6
    assert names <= {*record.summary(), *(f"layers/{name}" for name in CURVES)}


# ------------------------------------------------------------------------------------------------- MLflow


@pytest.fixture(scope="module")
def mlflow_folder(tmp_path_factory):
    """Of a local database, which takes seconds to be made."""
    return tmp_path_factory.mktemp("mlflow")


def test_mlflow_run_holds_everything(record, mlflow_folder, monkeypatch):
    monkeypatch.chdir(record.folder)
    tracking = pytest.importorskip("mlflow.tracking", reason="extra `mlflow`")
    many = dataclasses.replace(record, config={**CONFIG, "many": {str(i): "x" * 9999 for i in range(250)}})
    failed = dataclasses.replace(record, key="failed-1", result={}, error="SvlError: no")
    where = [Mlflow(folder=str(mlflow_folder)).mirror(run) for run in (record, many, failed)]
    assert where == [f"sqlite:///{mlflow_folder}/mlflow.db"] * 3
    client = tracking.MlflowClient(where[0])
    experiment = client.get_experiment_by_name("demo")
    runs = {run.data.tags["svl.key"]: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {record.key, "failed-1"}  # mirrored twice, it is one run
    run = runs[record.key]
    assert (run.info.status, run.info.run_name) == ("FINISHED", record.name)
    assert run.data.tags["model"] == "t" * 99
    assert {name: run.data.metrics.get(name) for name in NUMBERS} == NUMBERS
    assert run.data.params["strategy/name"] == "short_lvlm"
    assert run.data.params["many/249"] == "x" * 500
    curve = client.get_metric_history(run.info.run_id, "layers/cosine")
    assert [(point.step, point.value) for point in curve] == list(enumerate(CURVES["cosine"]))
    files = [f.path for kind in ("plan", "report", "figures") for f in client.list_artifacts(run.info.run_id, kind)]
    assert sorted(files) == ["figures/importance.png", "plan/plan.json", "report/flips.md", "report/result.json"]
    assert (runs["failed-1"].info.status, runs["failed-1"].data.tags["error"]) == ("FAILED", "SvlError: no")
    assert not (record.folder / "mlruns").exists()  # MLflow's own idea of where files go


def test_mlflow_is_an_extra(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(SvlError, match=r"pip install 'svl\[mlflow\]'"):
        Mlflow().mirror(record)


# ----------------------------------------------------------------------------------------------- pipeline


def test_sweep(tmp_path):
    """Of a sweep, what finished has the same columns whatever the strategy, and what failed is shown as failed."""
    command = [
        sys.executable, "-m", "svl", "-m", "strategy=tail,short_lvlm", "ratio=0.25,0.99", "benchmark=demo",
        "benchmark.limit=3", "calibration.samples=4", "name=columns", "tracker=wandb", "paths.store=store",
        "paths.outputs=out",
    ]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # this process's W&B
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert "2 of 4 jobs failed" in done.stderr
    runs = {}
    for file in (tmp_path / "out").rglob("run-*.wandb"):
        assert f"upload it with: wandb sync {file.parent}" in done.stdout
        records = read(file.parent)
        runs[int(file.parents[2].name)] = records
    assert sorted(runs) == [0, 1, 2, 3]
    assert {k: r["exit"][0].exit_code for k, r in runs.items()} == {0: 0, 1: 1, 2: 0, 3: 1}
    assert {r["run"][0].run_group for r in runs.values()} == {"columns"}
    columns = [summary_of(runs[k]) for k in (0, 2)]
    media = ("figures", "layers", "flips")  # flips: only if there are any
    names = [{name for name in found if not name.startswith(media)} for found in columns]
    assert names[0] == names[1]
    for number, columns_of in zip((0, 2), columns, strict=True):
        result = json.loads(next((tmp_path / "out").rglob(f"{number}/result.json")).read_text())
        told = {
            k: result[k] for k in ("scores", "average", "retained", "cost", "seconds", "ratio", "n_remove", "limit")
        }
        for name, value in flat(told):
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert value in columns_of.values(), name
        stored = runs[number]["run"][0]
        (key,) = (
            f.parent.name for f in (tmp_path / "store/run").glob("*/manifest.json") if f.parent.name == stored.run_id
        )
        config = {item.key: json.loads(item.value_json) for item in stored.config.update}
        assert config["svl"]["versions"] == result["versions"]
        assert config["svl"]["device"]["type"] in ("cpu", "cuda")
        assert key == stored.run_id
    assert summary_of(runs[1])["error"].startswith("SvlError: cannot remove 16 of 16")


@dataclasses.dataclass(frozen=True)
class Broken:
    """A tracker on a bad day."""

    def mirror(self, record: Record) -> str | None:
        """Fail."""
        return broken()


def test_no_failure_of_a_tracker_costs_a_result(tmp_path, monkeypatch, caplog):
    from hydra import compose, initialize_config_dir

    from svl import config

    settings = ["strategy=tail", "benchmark=none", f"paths.store={tmp_path / 's'}", f"paths.outputs={tmp_path / 'o'}"]
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", [*settings, "tracker=none"])
        wrong = compose("config", [*settings, "tracker=none", "n_remove=99"])
    (tmp_path / "o").mkdir()
    monkeypatch.setattr(Nowhere, "mirror", Broken.mirror)
    with caplog.at_level(logging.WARNING):
        assert pipeline.run(cfg, tmp_path / "o")["plan"]["removed"] == [11, 12, 13, 14]
    messages = [r.getMessage() for r in caplog.records if "tracked" in r.getMessage()]
    reason = "none failed: No space left on device"
    assert messages == [f"  the run is stored, but not tracked; running it again tracks it: {reason}"]
    caplog.clear()
    with pytest.raises(SvlError, match="cannot remove 99"):
        pipeline.run(wrong, tmp_path / "o")
    assert [r.getMessage() for r in caplog.records] == [f"  the failure is not tracked: {reason}"]
    assert not list((tmp_path / "s").glob("track/*"))

    seen = []
    monkeypatch.setattr(Nowhere, "mirror", lambda self, record: seen.append(record))
    for _ in range(2):
        pipeline.run(cfg, tmp_path / "o")
    assert [run.error for run in seen] == [None]  # again, once
    assert seen[0].curves == {"removed": [0] * 11 + [1] * 4 + [0]} | (
        {"importance": seen[0].result["plan"]["importance"]}
    )
    assert [file.name for files in seen[0].files.values() for file in files] == ["plan.json", "result.json"]


def test_none(record):
    before = sorted(record.folder.rglob("*"))
    assert Nowhere().mirror(record) is None
    assert sorted(record.folder.rglob("*")) == before
