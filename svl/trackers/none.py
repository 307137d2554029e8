"""Runs are not mirrored."""

from __future__ import annotations

from dataclasses import dataclass

from svl.record import Record


@dataclass(frozen=True)
class Nowhere:
    """No tracking."""

    def mirror(self, record: Record) -> str | None:
        """Nothing."""
        return None
