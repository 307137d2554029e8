"""The script that writes a model's own texts to a file, as data for recovery."""

from __future__ import annotations

from helpers.commands import run_command
from helpers.tasks import DEMO, script

import svl
from svl.calibration.generated_texts import generate_texts


def test_what_the_model_writes_is_training_data(tmp_path):
    """A file that recovery reads as running text, with what `generate_texts` gives for the same seed."""
    model = DEMO / "demo_lvlm"
    words = ("--model", str(model), "--texts", "3", "--tokens", "8", "--seed", "5", "--out", "new/own.jsonl")
    run_command(script("make_generated_texts").main, *words, cwd=tmp_path)
    expected = generate_texts(svl.load(model, device="cpu", dtype="float32"), 3, 8, 5)
    samples = svl.read_samples(tmp_path / "new/own.jsonl")
    assert [sample.prompt for sample in samples] == expected
    assert all(sample.plain for sample in samples)
