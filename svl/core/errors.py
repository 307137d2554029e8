"""The error that people see, and the checks of plain values that raise it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# torch's allocator of the CPU, accelerators, libraries on accelerators, the operating system
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "_ALLOC_FAILED", "Cannot allocate memory")
LONGEST_REASON = 500  # letters of an exception of another library that are shown


class SvlError(Exception):
    """A mistake a person can mend: bad input, missing data, full disk. Shown as one line, without a traceback."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the first of `similar` options, or an empty string."""
    found = similar(word, options)
    return f" (did you mean '{found[0]}'?)" if found else ""


def similar(word: str, options: Iterable[str], cutoff: float = 0.65) -> list[str]:
    """What `word` was probably meant for, the likeliest first.

    Options that begin with it, have it as initials ("lr" of "learning_rate") or contain it; then those that are spelt
    like it, if difflib's ratio is at least `cutoff`. What all have in common up to a dot ("model.") says nothing.
    """
    names = [str(option) for option in options]
    shared = os.path.commonprefix([str(word), *names])  # noqa: RUF071 (of names, not of paths)
    common = len(shared.rpartition(".")[0])
    asked, *ends = (name[common:].lstrip(".").lower() for name in (str(word), *names))
    likeness = {end: difflib.SequenceMatcher(None, end, asked).ratio() for end in ends}
    initials = {end: "".join(part[:1] for part in end.split("_")) for end in ends}
    signs = (
        {end for end in ends if end.startswith(asked) and len(asked) > 1},
        {end for end in ends if initials[end] == asked and len(asked) > 1},
        {end for end in ends if asked in end and len(asked) > 2},
        {end for end in ends if likeness[end] >= cutoff},
    )
    likeliest = sorted(zip(names, ends, strict=True), key=lambda option: -likeness[option[1]])
    return list(dict.fromkeys(name for sign in signs for name, end in likeliest if end in sign))


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise SvlError unless `value` is one of `allowed`."""
    if value not in allowed:
        listing = ", ".join(map(str, allowed))
        raise SvlError(f"{name} is '{value}', but must be one of: {listing}{did_you_mean(value, allowed)}")


@contextmanager
def explained(what: str, hint: str = "") -> Iterator[None]:
    """Within the block, any exception becomes one line: "<what>: <reason><hint>"; the traceback stays as its cause.

    For calls into other libraries with what a user gave (files, templates, samples): they raise anything. An SvlError
    passes as it is, and so does running out of memory, which `out_of_memory` explains.
    """
    try:
        yield
    except SvlError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SvlError(f"{what}: {reason_of(error)}{hint}") from error


@contextmanager
def out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Within the block, running out of memory, on host or device, becomes one line that ends in what to do about it.

    Args:
        what: was being done, such as "calibration".
        advice: what to turn down, such as "lower calibration.batch_size".
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        size = f" when it asked for {asked[1]}" if asked else ""
        raise SvlError(f"{what} ran out of memory{size}: {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out: Python's error, torch's, or one of the many that say it in words only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, SvlError):
        return False
    return any(words in str(error) for words in _NO_MEMORY)


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, after its type where that is needed to understand it.

    With the second line, where the first one only announces it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[:LONGEST_REASON]} ..."
    return reason if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {reason}"
