"""Runs are not mirrored."""

from __future__ import annotations

from dataclasses import dataclass

from svl.trackers.record import Record, Tracker


@dataclass(frozen=True)
class Nowhere(Tracker):
    """No tracking."""

    def mirror(self, record: Record) -> str | None:
        """Nothing."""
        return None
