"""The page on recovery: its Python runs, and what it derives follows from the formula that it gives."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.races import in_another_process
from torch.nn.functional import cross_entropy

import svl
from svl.core import Plan
from svl.data.samples import Sample, Samples
from svl.recovery.batches import ANSWER, Batches
from svl.recovery.losses import answer_targets, forward_pass

pytest.importorskip("peft")
PAGE = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
IN_PYTHON, BY_HAND = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path, *words: str) -> None:
    """As `python SCRIPT WORDS` in a folder, in a process that is forked from this one."""
    (folder / "script.py").write_text(script)

    def work() -> None:
        os.chdir(folder)
        sys.argv[1:] = words
        with (folder / "printed").open("w") as sys.stdout:
            runpy.run_path("script.py", run_name="__main__")

    assert in_another_process(work) is None


def test_an_export_is_fine_tuned_by_peft_in_few_lines(tmp_path):
    """On the answer alone: its first loss is that of svl's own recovery, before a step."""
    from PIL import Image

    assert len([line for line in BY_HAND.splitlines()[1:] if line.strip()]) <= 23
    svl.save(ROOT / "svl/demo/demo_lvlm", Plan(16, (6, 7, 9, 14)), tmp_path / "exported")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    run(BY_HAND, tmp_path, "exported", "picture.png")
    losses = [float(line) for line in (tmp_path / "printed").read_text().split()]
    exported = svl.load(tmp_path / "exported", device="cpu")
    sample = Sample(0, "Is there a red circle?", ((tmp_path / "picture.png").read_bytes(),), "yes")
    (group,) = Batches(exported, Samples("", (sample,)))([0])["groups"]
    answer = group.pop(ANSWER)
    with torch.no_grad():
        logits, _ = forward_pass(exported, group, answer, [])
    expected = float(cross_entropy(logits, answer_targets(group, answer)))
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert svl.load(tmp_path / "exported-tuned", device="cpu").anatomy.n_layers == 12


def test_its_python_runs(tmp_path):
    (tmp_path / "svl").symlink_to(ROOT / "svl")
    run(IN_PYTHON.replace("steps=20", "steps=1"), tmp_path)
    assert svl.load(tmp_path / "healed", device="cpu").anatomy.n_layers == 12


def test_derived_memory_follows_from_the_formula():
    d, m, tokens, kept = 4096, 11008, 640, 24
    layer = 4 * d * d + 3 * d * m
    adapters = 16 * kept * (4 * 2 * d + 3 * (d + m))
    projector = 1024 * d + d + d * d + d
    one = 2 * (10 * d + 4 * m) * tokens / 1e9  # layer's activations
    saved, all_of_it = 2 * d * tokens * kept / 1e9 + one, one * kept
    teacher = (2 + 4) * d * tokens * 25 / 1e9  # its states, and their distances in fp32
    expected = {
        "projector": (projector, saved, all_of_it),
        "lora": (adapters, saved, all_of_it),
        "distill": (adapters + projector, saved + teacher, all_of_it + teacher),
        "interlace": (8 * (layer + 2 * d), saved, all_of_it),
    }
    rows = re.findall(
        r"^\| `(\w+)`.*?\| 14\.1 GB \| (\d+) M \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$", PAGE, re.M
    )
    assert len(rows) == 4
    for name, trained, memory, checkpointed, plain in rows:
        numbers, small, large = expected[name]
        assert int(trained) == round(numbers / 1e6)
        assert float(memory) == round(16 * numbers / 1e9, 1)
        assert float(checkpointed) == round(small, 2)
        assert float(plain) == pytest.approx(large, abs=0.06)
