"""Synthetic stores."""

from typing import Any
from unittest.mock import patch

import pytest

from svl.report import pictures
from svl.store.artifacts import Store


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store; `store.add(result, ...)` adds finished runs, each a second younger than the one before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVL_STORE", str(tmp_path / "store"))
    made: Any = Store(tmp_path / "store")
    ages = iter(range(60))

    def add(*results, files=lambda folder: None):
        for body in results:
            age = next(ages)

            def build(folder, body=body):
                files(folder)
                return body

            with patch("time.strftime", return_value=f"2026-01-01T00:00:{age:02}+0000"):
                made.make("run", {"number": age}, build)

    made.add = add
    return made


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without figures, which take most of the time."""
    monkeypatch.setattr(pictures, "draw_figures", lambda *_: [])
