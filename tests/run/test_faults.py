"""A disk that is full when a stage is written: one line, nothing half-written, and what was finished is kept."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from helpers.commands import SMALL, manifests, run_svl

WORDS = ("tracker=none", "paths.store=store", "paths.outputs=out", "model.device=cpu", *SMALL)
SCORED = ("benchmark=demo_validation", "benchmark.limit=2", "efficiency=default", "efficiency.repeats=1")
RUNS = {
    "chosen by statistics": (
        ("strategy=shortgpt", "compensation=linear", *SCORED),
        ("stats", "plan", "check", "patch", "plan.json", "score", "efficiency", "run", "result.json"),
    ),
    "chosen by losses": (("strategy=shortened_ppl", "compensation=none", "benchmark=none"), ("probe", "plan", "run")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_full_disk_at_any_stage_loses_nothing_that_was_finished(name, tmp_path, monkeypatch):
    if "benchmark=none" not in RUNS[name][0]:
        pytest.importorskip("lmms_eval")
    words, places = RUNS[name]
    kept: dict[str, int] = {}
    for place in places:

        def full(source, target, place=place, replace=os.replace):
            if place in (Path(target).parent.name, Path(target).name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            replace(source, target)

        with monkeypatch.context() as fault:
            fault.setattr(os, "replace", full)
            line = run_svl(*words, *WORDS, cwd=tmp_path, code=1).stderr.splitlines()[-1]
        what = "" if "." in place else rf"cannot write stage '{place}' to the store \S+: "
        assert re.match(rf"error: {what}No space left on device", line), line
        assert not list(tmp_path.glob("store/tmp/*"))
        assert not list(tmp_path.rglob("*.incomplete"))
        assert not list(tmp_path.glob(f"store/{place}/*"))
        found = manifests(tmp_path / "store")
        assert kept.items() <= found.items()
        kept = found
    run_svl(*words, *WORDS, cwd=tmp_path)
    assert kept.items() <= manifests(tmp_path / "store").items()
