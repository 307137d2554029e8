"""What scripts/bench_device.py measured, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines_of(piece: str, found: dict[str, Any]) -> Iterator[str]:
    """A piece's part of the table."""
    if piece == "a":
        yield f"{found['samples']} samples, T = {found['tokens']}"
        for name, row in found["rows"].items():
            yield f"{name:28s} {row['seconds']:8.3f} s  x{row['times_forward']:.3f}{in_gb(row)}"
    elif piece == "b":
        yield f"removed: {found['removed']}"
        for name, row in found.items():
            if name != "removed":
                yield f"{name:28s} {row['seconds']:8.2f} s{in_gb(row)}"
    elif piece in ("c", "d", "i"):
        yield f"{'':34s} {'prefill':>9s} {'decode':>9s} {'answer':>9s} {'ideal':>7s} {'samples/s':>16s} {'paper':>7s}"
        for name, row in found.items():
            yield speed_line(name, row)
    elif piece == "e":
        yield f"{found['plans']} plans, {found['batch_size']} prompts"
        for name, row in found.items():
            for way, measured in row.items() if isinstance(row, dict) else ():
                gain = f"{measured['seconds']:8.2f} s  x{measured['times']:.2f}{in_gb(measured)}"
                yield f"{name:10s} {way:14s} {gain}; equal answers {measured['equal_answers']:.1%}"
    elif piece == "f":
        for name, row in found.items():
            plans = f"{row['equal_plans']} of {row['plans']} plans"
            equal = f"{row['equal_answers']:.1%} of the answers, {plans}"
            right = f"right {row['right']:.1%}; lock step as one by one: {row['lock_step']:.1%}"
            yield f"{name:14s} equal to the first: {equal}; {right}"
    else:
        for name, value in found.items():
            shown = f"{value:.3f}" if isinstance(value, float) else value
            yield from shown if isinstance(shown, list) else [f"{name:28s} {shown}"]


def in_gb(row: dict[str, Any]) -> str:
    """The peak of memory, where it was counted."""
    return "" if row["peak_gb"] is None else f"  peak {row['peak_gb']:.2f} GB"


def speed_line(name: str, row: dict[str, Any]) -> str:
    """What `measure_efficiency` found, in one line."""
    parts = " ".join(f"{row['speedup'][part]['value']:9.3f}" for part in ("prefill", "decode", "total"))
    rates = f"{row['dense']['samples_per_second']:.2f} -> {row['pruned']['samples_per_second']:.2f}"
    paper = f"{row['paper']:7.2f}" if row.get("paper") and "short" in name else ""
    return f"{name:34s} {parts} {row['ideal']:7.3f} {rates:>16s} {paper}".rstrip()
