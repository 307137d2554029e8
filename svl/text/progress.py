"""What is shown of long work: a bar on a terminal; elsewhere (files, cluster logs) a line every half minute."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from svl.processes import process_rank

log = logging.getLogger(__name__)
INTERVAL = 30.0  # seconds between two lines


def is_terminal() -> bool:
    """Whether bars can be seen where they are drawn."""
    return sys.stderr.isatty()


def in_time_units(seconds: float) -> str:
    """ "40 s", "3 min", "2 h 10 min": a duration as precise as an estimate of it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressLines:
    """Progress as log lines, one in INTERVAL seconds at most; nothing of work that is done before the first is due.

    Args:
        what: what is being done.
        total: of how much.
        unit: of what.
        clock: seconds that only grow.
    """

    def __init__(self, what: str, total: int, unit: str = "", clock: Callable[[], float] = time.monotonic):
        self.what, self.total, self.unit, self.clock = what, total, unit, clock
        self.done, self.began = 0.0, clock()
        self.last = self.began
        self.at_start = 0.0  # of what is done, what was so before

    def begin_at(self, done: float) -> None:
        """So much is done already, and time counts from now: of work that goes on where another process left it."""
        self.done = self.at_start = done
        self.began = self.last = self.clock()

    def update(self, more: float, remark: str = "") -> None:
        """So much more is done; `remark` is told behind it."""
        self.done += more
        now = self.clock()
        if now - self.last < INTERVAL or not self.at_start < self.done < self.total:
            return
        self.last = now
        left = (now - self.began) * (self.total - self.done) / (self.done - self.at_start)
        unit = f" {self.unit}" if self.unit else ""
        told = f", {remark}" if remark else ""
        log.info("  %s: %d of %d%s%s, about %s left", self.what, self.done, self.total, unit, told, in_time_units(left))


@contextmanager
def progress(what: str, total: int, unit: str = "") -> Iterator[Callable[[int], Any]]:
    """Within the block, progress is shown; gives the function that is told how much more is done.

    Of several processes of a run, the first one speaks.
    """
    if not is_terminal():
        yield ProgressLines(what, total, unit).update
        return
    shown = {"unit": unit or "it", "leave": False, "dynamic_ncols": True, "disable": process_rank() > 0}
    with tqdm(desc=f"  {what}", total=total, **shown) as bar:
        yield bar.update


@contextmanager
def progress_by_share(what: str) -> Iterator[Callable[[float, str], None]]:
    """Within the block, progress is shown; gives the function that is told the share that is done, and a remark.

    What is told first is where the work begins: time counts from there.
    """
    lines: ProgressLines | None = None

    def say(share: float, remark: str) -> None:
        nonlocal lines
        if lines is None:
            lines = ProgressLines(what, 100, "%")
            lines.begin_at(100 * share)
        lines.update(100 * share - lines.done, remark)

    if not is_terminal():
        yield say
        return
    shown = {"unit": "%", "leave": False, "dynamic_ncols": True, "disable": process_rank() > 0}
    with tqdm(desc=f"  {what}", total=100, **shown) as bar:

        def done(share: float, remark: str) -> None:
            if not bar.n and share:
                bar.reset()
                bar.initial = bar.n = round(100 * share, 1)
            bar.set_postfix_str(remark, refresh=False)
            bar.update(round(100 * share, 1) - bar.n)

        yield done


def show_progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """The items, with progress over them."""
    with progress(what, total) as done:
        for item in items:
            yield item
            done(1)


@contextmanager
def still_working(what: str) -> Iterator[None]:
    """Within the block, whose progress nobody knows, a line every INTERVAL seconds says that it goes on."""
    ended, began = threading.Event(), time.monotonic()

    def speak() -> None:
        while not ended.wait(INTERVAL):
            log.info("  %s: %s so far", what, in_time_units(time.monotonic() - began))

    if is_terminal():
        yield
        return
    speaker = threading.Thread(target=speak, name="progress", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()
