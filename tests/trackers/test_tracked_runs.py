"""Trackers at the end of the pipeline."""

import dataclasses
import json
import logging

import pytest
from helpers.commands import run_svl
from helpers.records import read_offline_run, summary_of

from svl.core import SvlError
from svl.run import pipeline
from svl.trackers.none import Nowhere
from svl.trackers.record import Record, Tracker, flatten


def test_sweep(tmp_path):
    """Of a sweep, what finished has the same columns whatever the strategy, and what failed is shown as failed."""
    jobs = ("strategy=tail,short_lvlm", "ratio=0.25,0.99", "name=columns", "calibration.samples=4")
    benchmark = ("benchmark=demo", "benchmark.limit=3", "~benchmark.tasks.svl_demo_choice")
    where = ("tracker=wandb", "paths.store=store", "paths.outputs=out")
    done = run_svl("-m", *jobs, *benchmark, *where, cwd=tmp_path, code=1)
    assert "2 of 4 jobs failed" in done.stderr
    runs = {}
    for file in (tmp_path / "out").rglob("run-*.wandb"):
        assert f"upload it with: wandb sync {file.parent}" in done.stdout
        records = read_offline_run(file.parent)
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
        for name, value in flatten(told):
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
class Broken(Tracker):
    """A tracker on a bad day."""

    def mirror(self, record: Record) -> str | None:
        """Fail."""
        raise OSError("No space left\non device")


def test_no_failure_of_a_tracker_costs_a_result(tmp_path, monkeypatch, caplog):
    from hydra import compose, initialize_config_dir

    from svl import config

    settings = ["strategy=tail", "benchmark=none", f"paths.store={tmp_path / 's'}", f"paths.outputs={tmp_path / 'o'}"]
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", [*settings, "tracker=none"])
        wrong = compose("config", [*settings, "tracker=none", "n_remove=99"])
    (tmp_path / "o").mkdir()
    monkeypatch.setattr(Nowhere, "mirror", Broken.mirror)
    with caplog.at_level(logging.WARNING):
        assert pipeline.run_configuration(cfg, tmp_path / "o")["plan"]["removed"] == [11, 12, 13, 14]
    messages = [r.getMessage() for r in caplog.records if "tracked" in r.getMessage()]
    reason = "none failed: No space left on device"
    assert messages == [f"  the run is stored, but not tracked; running it again tracks it: {reason}"]
    caplog.clear()
    with pytest.raises(SvlError, match="cannot remove 99"):
        pipeline.run_configuration(wrong, tmp_path / "o")
    assert [r.getMessage() for r in caplog.records] == [f"  the failure is not tracked: {reason}"]
    assert not list((tmp_path / "s").glob("track/*"))

    seen = []
    monkeypatch.setattr(Nowhere, "mirror", lambda self, record: seen.append(record))
    for _ in range(2):
        pipeline.run_configuration(cfg, tmp_path / "o")
    assert [run.error for run in seen] == [None]  # again, once
    assert seen[0].curves == {"removed": [0] * 11 + [1] * 4 + [0]} | (
        {"importance": seen[0].result["plan"]["importance"]}
    )
    assert [file.name for files in seen[0].files.values() for file in files] == ["plan.json", "result.json"]


def test_several_trackers_share_no_failure(tmp_path, monkeypatch, caplog):
    """What one could not show is shown by the next run, and by that one alone."""
    pytest.importorskip("tensorboard", reason="extra `tensorboard`")
    from hydra import compose, initialize_config_dir

    from svl import config

    settings = ["strategy=tail", "benchmark=none", f"paths.store={tmp_path / 's'}", f"paths.outputs={tmp_path / 'o'}"]
    trackers = ["tracker=several", "~tracker@tracker.of.wandb", "+tracker@tracker.of.none=none"]
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", [*settings, *trackers])
    (tmp_path / "o").mkdir()
    monkeypatch.setattr(Nowhere, "mirror", Broken.mirror)
    with caplog.at_level(logging.WARNING):
        pipeline.run_configuration(cfg, tmp_path / "o")
    messages = [r.getMessage() for r in caplog.records if "tracked" in r.getMessage()]
    assert [message.partition(": ")[2] for message in messages] == ["none failed: No space left on device"]
    (events,) = (tmp_path / "o/tensorboard").rglob("events.out.*")
    seen = []
    monkeypatch.setattr(Nowhere, "mirror", lambda self, record: seen.append(record))
    pipeline.run_configuration(cfg, tmp_path / "o")
    assert [run.kind for run in seen] == ["prune"]
    assert list((tmp_path / "o/tensorboard").rglob("events.out.*")) == [events]
    assert len(list((tmp_path / "s").glob("track/*/manifest.json"))) == 2
