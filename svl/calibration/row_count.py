"""How much a measurement costs: rows (samples of a batch) that go through decoder layers, each layer counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class RowCount:
    """Rows through decoder layers so far."""

    rows: int = 0


_active: ContextVar[RowCount | None] = ContextVar("active row count", default=None)


@contextmanager
def counted_rows() -> Iterator[RowCount]:
    """Within the block, what goes through decoder layers is counted here, and not in a count around the block."""
    count = RowCount()
    token = _active.set(count)
    try:
        yield count
    finally:
        _active.reset(token)


def add_rows(rows: int) -> None:
    """Count rows, where a count is open."""
    if count := _active.get():
        count.rows += rows


def is_counting() -> bool:
    """Whether a count is open."""
    return _active.get() is not None
