"""Several trackers at once, by name. Each has its own time and its own failures: none costs another its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from svl.core import SvlError
from svl.trackers.record import Record, Tracker


@dataclass(frozen=True)
class Several(Tracker):
    """See the module.

    Attributes:
        of: the trackers by name.
    """

    of: Mapping[str, Tracker] = field(default_factory=dict)

    def each(self, name: str) -> Mapping[str, Tracker]:
        """See the base class."""
        return self.of

    def check(self) -> None:
        """See the base class; there must be at least one tracker."""
        if not self.of:
            raise SvlError("tracker=several has no tracker: choose some with +tracker@tracker.of.NAME=NAME")
        for tracker in self.of.values():
            tracker.check()

    def mirror(self, record: Record) -> str | None:
        """Show a run in all of them, one after the other; the first failure ends it. (The pipeline asks `each`.)"""
        places = [tracker.mirror(record) for tracker in self.of.values()]
        return ", ".join(place for place in places if place) or None
