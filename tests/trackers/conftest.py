"""A record, and no settings of the person who runs the tests."""

import json
import os

os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B reads it when imported; tests use no network

import pytest
from helpers.records import CONFIG, CURVES, FLIPS, PLAN, RESULT, TRAINING
from PIL import Image

from svl.trackers.record import Record


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """W&B's own folders under the test's, and no settings of the person who runs the tests."""
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    for name in ("WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


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
        config=CONFIG, folder=folder, result=RESULT, curves=CURVES, flips=FLIPS, training=TRAINING,
        figures={"importance": folder / "importance.png"},
        files={"plan": [folder / "plan.json"], "report": [folder / "result.json", folder / "flips.md"]},
    )  # fmt: skip
