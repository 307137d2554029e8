"""The page of a running sweep: a file, written again whenever a run has finished, that a browser reads again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from svl.report import page
from svl.report.experiment_report import Report, write_report_file
from svl.report.results import runs_by_experiment
from svl.store.artifacts import Store


def follow(store: Store, name: str, out: Path, seconds: int, ticks: Iterable[object]) -> Iterator[int]:
    """Keep the report of experiment `name` in `out` up to date; at its end, the page no longer asks to be read again.

    Args:
        store: where runs are stored as they finish; it may not be there yet.
        name: of the experiment.
        out: folder of the report. Every file in it is whole at any time.
        seconds: after how many a browser reads the page again.
        ticks: the store is looked at once for each.

    Yields:
        After each tick with news, how many runs have finished.

    Raises:
        SvlError: if the report cannot be made or written.
    """
    known: set[str] | None = None
    if not (out / "report.html").exists():  # figures take a while
        _write(store, name, out, page.Live(seconds, "the store is read."), is_empty=True)
    try:
        for _ in ticks:
            keys = runs_by_experiment(store).get(name, set())
            if keys != known:
                known = keys
                _write(store, name, out, page.Live(seconds, _news(store, keys)), is_empty=not keys)
                yield len(keys)
    finally:
        if known is not None:
            _write(store, name, out, None, is_empty=not known)


def _write(store: Store, name: str, out: Path, live: page.Live | None, is_empty: bool) -> None:
    if is_empty:
        write_report_file(out, "report.html", page.render_page(name, [], [], [], store, live))
    else:
        Report.read(store, name).write(out, live)


def _news(store: Store, keys: set[str]) -> str:
    """How far the sweep is."""
    if not keys:
        return "no run has finished yet."
    last = max(entry.manifest["created"] for entry in store.entries("run") if entry.key in keys)
    plural = "run has" if len(keys) == 1 else "runs have"
    return f"{len(keys)} {plural} finished, the last one at {last}."


def every(seconds: float) -> Iterator[None]:
    """A tick now, and one every so many seconds."""
    while True:
        yield
        time.sleep(seconds)
