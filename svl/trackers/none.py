"""Runs are not mirrored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.trackers.record import Record, Tracker


@dataclass(frozen=True)
class Nowhere(Tracker):
    """No tracking."""

    does_nothing: ClassVar[bool] = True

    def mirror(self, record: Record) -> str | None:
        """Nothing."""
        return None
