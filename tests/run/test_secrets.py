"""Secrets that were typed as settings are in nothing that a run writes or prints."""

from __future__ import annotations

import sys
import textwrap

import pytest
from helpers.commands import QUIET, run_svl

SECRET = "hunter2-hunter2"
TRACKER = """
    from dataclasses import dataclass

    from svl.trackers.record import Record, Tracker


    @dataclass(frozen=True)
    class Telling(Tracker):
        uri: str = ""
        api_key: str = ""

        def mirror(self, record: Record) -> str | None:
            assert "hunter2" in self.uri and "hunter2" in self.api_key
            (record.folder / "told.txt").write_text(repr(record))
            if "broken" in self.uri:
                raise OSError(f"no answer of {self.uri} with api_key={self.api_key}")
            return None
"""


@pytest.fixture(autouse=True)
def _forget_plugins(monkeypatch):
    """Each test's plugin lies in a folder of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "telling"]:
        del sys.modules[name]


@pytest.mark.parametrize("words", [(), ("-m", "ratio=0.125,1.5")], ids=["run", "sweep"])
def test_secrets_are_written_nowhere(words, tmp_path):
    (tmp_path / "telling").mkdir()
    (tmp_path / "telling" / "tracker.py").write_text(textwrap.dedent(TRACKER))
    done = run_svl(
        *words,
        "tracker._target_=telling.tracker.Telling",
        f"tracker.uri=http://me:{SECRET}@broken:5000/x",
        f"tracker.api_key={SECRET}",
        f"+evaluator.options.hf_token={SECRET}",
        "strategy=tail",
        *QUIET,
        cwd=tmp_path,
        code=1 if words else 0,
        SVL_PLUGINS="./telling",
    )
    files = [file for file in tmp_path.rglob("*") if file.is_file() and "telling" not in file.parts]
    names = {file.name for file in files}
    assert names >= {"config.yaml", "hydra.yaml", "overrides.yaml", "run.log", "told.txt", "result.json"}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr
    assert "no answer of http://***@broken:5000/x with api_key=***" in done.stdout
