"""A real MLflow database."""

import dataclasses

import pytest
from helpers.records import CONFIG, CURVES, NUMBERS, RESULT, TRAINING

from svl.core import SvlError
from svl.trackers.mlflow import Mlflow


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
    losses = client.get_metric_history(run.info.run_id, "recover/loss")
    assert [(point.step, point.value) for point in losses] == [(t["step"], t["loss"]) for t in TRAINING]
    files = [f.path for kind in ("plan", "report", "figures") for f in client.list_artifacts(run.info.run_id, kind)]
    assert sorted(files) == ["figures/importance.png", "plan/plan.json", "report/flips.md", "report/result.json"]
    assert (runs["failed-1"].info.status, runs["failed-1"].data.tags["error"]) == ("FAILED", "SvlError: no")
    assert not (record.folder / "mlruns").exists()  # MLflow's own idea of where files go


@pytest.mark.parametrize(
    ("uri", "is_known"),
    [("http://here:5000", True), ("mysql+pymysql://db/x", True), ("databricks", True), ("mlruns", False),
     ("file:///there", False), ("sqllite:///x.db", False)],
)  # fmt: skip
def test_addresses_that_mlflow_does_not_take_are_found_before_any_work(uri, is_known):
    if is_known:
        Mlflow(uri=uri).check()
    else:
        with pytest.raises(SvlError, match=r"the scheme of tracker\.uri is .*sqlite"):
            Mlflow(uri=uri).check()


def test_mlflow_takes_any_name_of_a_metric_or_setting(record, mlflow_folder):
    tracking = pytest.importorskip("mlflow.tracking", reason="extra `mlflow`")
    odd = {"exact,match": 0.5, "exact;match": 0.25, "../up": 0.125, "a//b": 1.0, "π ≤ 1": 2.0, "x" * 300: 3.0}
    metrics = {name: {"value": value, "stderr": None, "dense": None} for name, value in odd.items()}
    scores = {"yes": {"metric": "exact,match", "n": 9, "metrics": metrics, "change": None}}
    strange = dataclasses.replace(
        record,
        key="odd-1",
        group="odd",
        result=RESULT | {"scores": scores},
        config={"a,b": {"c;d": 1}, "a;b": {"c,d": 2}},
    )
    where = Mlflow(folder=str(mlflow_folder)).mirror(strange)
    client = tracking.MlflowClient(where)
    (run,) = client.search_runs([client.get_experiment_by_name("odd").experiment_id])
    found = {name: value for name, value in run.data.metrics.items() if name.startswith("eval/yes/")}
    assert sorted(found.values()) == sorted(odd.values())
    assert {
        "eval/yes/exact_match": 0.5,
        "eval/yes/exact_match-2": 0.25,
        "eval/yes/__/up": 0.125,
    }.items() <= found.items()
    assert run.data.params == {"a_b/c_d": "1", "a_b/c_d-2": "2"}
