"""Texts of the model's own in a run: kept, shared, and absent unless asked for."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from svl import config
from svl.calibration import generated_texts
from svl.config import CONF
from svl.run import pipeline


def prepare(folder: Path, strategy: str, *words: str):
    """A run up to its patch, with its store in `folder`."""
    words += (f"strategy={strategy}", "benchmark=none", "tracker=none", "model.device=cpu", "calibration.samples=2")
    words += (f"paths.store={folder}", f"paths.outputs={folder}", "calibration.generated_tokens=5")
    config.register_with_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return pipeline.Run(compose("config", overrides=list(words)), folder).prepare()


def test_texts_are_written_once_and_change_compensations_only(tmp_path, monkeypatch):
    run = partial(prepare, tmp_path, "shortgpt")
    plain = run("compensation=linear")
    assert plain.texts is None
    assert not (tmp_path / "texts").exists()
    with_texts = run("compensation=linear", "calibration.generated=3")
    texts = json.loads((with_texts.texts.path / "texts.json").read_text())
    assert [len(text.split()) for text in texts] == [5, 5, 5]
    assert "generate" in with_texts.by_name
    assert with_texts.stats.reused
    assert with_texts.planned.reused
    assert with_texts.patch.key != plain.patch.key
    again = run("compensation=linear")  # as before, from the store
    assert again.patch.reused
    assert again.patch.key == plain.patch.key
    assert "texts" not in again.patch.manifest["inputs"]

    monkeypatch.setattr(generated_texts, "generate_texts", lambda *_: pytest.fail("written again"))
    key = with_texts.texts.key
    assert run("compensation=mean_update", "calibration.generated=3").texts.key == key
    assert run("compensation=refit", "compensation.texts=3", "compensation.layers=gaps").texts.key == key
    assert run("compensation=refit_generated", "calibration.generated=0", "compensation.layers=gaps").texts is None
    assert run("compensation=merge", "calibration.generated=9").texts is None  # which reads no states


def test_a_rescored_strategy_is_compensated_with_texts_too(tmp_path):
    run = partial(prepare, tmp_path, "iterative", "compensation=linear", "n_remove=2")
    plain, with_texts = run(), run("calibration.generated=2")
    assert plain.planned.key != with_texts.planned.key
    assert with_texts.planned.manifest["inputs"]["rescoring"]["texts"] == with_texts.texts.key
