"""Progress where the output is no terminal: few lines, and right ones."""

from __future__ import annotations

import logging

import pytest

from svl.text.progress import INTERVAL, ProgressLines, in_time_units, show_progress


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_line_every_half_minute_with_the_time_left(caplog):
    caplog.set_level(logging.INFO, "svl")
    now = 0.0
    lines = ProgressLines("svl_pope", 900, "questions", clock=lambda: now)
    for _ in range(90):  # ten questions a second
        now += 1
        lines.update(10)
    assert said(caplog) == [
        "  svl_pope: 300 of 900 questions, about 60 s left",
        "  svl_pope: 600 of 900 questions, about 30 s left",
    ]


def test_work_that_goes_on_is_timed_from_where_it_began(caplog):
    """At 80 % when this process takes it up; a tenth more in a minute leaves a minute."""
    caplog.set_level(logging.INFO, "svl")
    now = 1000.0
    lines = ProgressLines("recover", 100, "%", clock=lambda: now)
    now += 500  # the model is loaded
    lines.begin_at(80)
    for _ in range(6):
        now += 10
        lines.update(10 / 6)
    assert said(caplog) == [
        "  recover: 85 of 100 %, about 90 s left",
        "  recover: 90 of 100 %, about 60 s left",
    ]


def test_short_work_says_nothing(caplog):
    caplog.set_level(logging.INFO, "svl")
    lines = ProgressLines("calibrate", 4, clock=lambda: INTERVAL - 1)
    for _ in range(4):
        lines.update(1)
    assert list(show_progress(range(3), "probe", 3)) == [0, 1, 2]
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3569, "59 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert in_time_units(seconds) == text
