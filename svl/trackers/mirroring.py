"""Handing a record to a tracker: without secrets, in limited time."""

from __future__ import annotations

import threading
from dataclasses import replace

from svl.text.redaction import redact_text, redact_values
from svl.trackers.record import Record, Tracker

GRACE = 10.0  # seconds beyond its timeout that a tracker has to give up by itself, with words of its own


def mirror_in_time(tracker: Tracker, record: Record) -> str | None:
    """What `tracker.mirror(record)` gives or raises, but without secrets in the record and within its timeout.

    Raises:
        TimeoutError: if it takes longer. It then goes on in a thread that does not hold up the end of the process.
    """
    results: list[str | None] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(tracker.mirror(without_secrets(record)))
        except BaseException as error:  # noqa: BLE001 (raised again below)
            errors.append(error)

    thread = threading.Thread(target=work, name="tracker", daemon=True)
    thread.start()
    thread.join(tracker.timeout + GRACE)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"it was not through after {tracker.timeout + GRACE:g} s (tracker.timeout)")
    return results[0]


def without_secrets(record: Record) -> Record:
    """The record with passwords, tokens and the like hidden in its settings and messages."""
    return replace(
        record,
        name=redact_text(record.name),
        tags=[redact_text(tag) for tag in record.tags],
        config=redact_values(record.config),
        result=redact_values(record.result),
        error=None if record.error is None else redact_text(record.error),
    )
