"""Files and folders: their hashes, and writing them whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from svl.core.errors import SvlError
from svl.store.locks import UNIQUE, held, unique_name

T = TypeVar("T")

# Errors that are the file system's, never a bug: full, forbidden, gone, not able to.
DISK_ERRORS = tuple(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "ENAMETOOLONG", "ELOOP", "EIO"),
        *("ESTALE", "EXDEV", "ENOLCK", "EOPNOTSUPP", "ENOSYS", "EMFILE", "ENFILE", "ETIMEDOUT"),
    )
)

TORCH_WRITE_ERRORS = ("unexpected pos ", "PytorchStreamWriter failed writing")  # torch.save, on a disk that is full


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def nested_strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and dict values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from nested_strings(item)


def remembered(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """`read(path)`, once in this process for a file that stays as it is by inode, size and times.

    A file of the last two seconds is read again: within a tick of the clock, a change would leave its times.
    """
    known: dict[tuple[str, int, int, int, int], T] = {}

    @wraps(read)
    def once(path: Path) -> T:
        info, now = os.stat(path), time.time_ns()
        state = (str(path), info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if state in known:
            return known[state]
        value = read(path)
        if now - max(info.st_mtime_ns, info.st_ctime_ns) > 2 * 10**9:
            known[state] = value
        return value

    return once


@remembered
def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(error: BaseException) -> str | None:
    """Why `error` means that the disk cannot be written, or None. (safetensors hides the number in its text.)"""
    if any(words in str(error) for words in TORCH_WRITE_ERRORS):
        return "a file could not be written to its end (is the disk full?)"
    for code in DISK_ERRORS:
        if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
            return reason_with_file(os.strerror(code), error)
    return None


def reason_with_file(reason: str, error: BaseException) -> str:
    """`reason`, with the file that an OSError names."""
    file = getattr(error, "filename", None)
    return f"{reason} ('{file}')" if file else reason


# -------------------------------------------------------------------------------------------- whole or not at all


def scratch_beside(path: Path) -> Path:
    """A name beside `path` that no one else uses, on the same file system."""
    return path.with_name(f".{path.name}.{unique_name()}.incomplete")


def remove_path(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link (and not what it leads to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write; it replaces `path` at the end, or vanishes if writing fails."""
    temporary = scratch_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> Path:
    """Write a text file (UTF-8) whole or not at all; gives `path`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes the new folder `path` when the block is through; if it fails, nothing is left.

    Raises:
        SvlError: if another process is writing `path`, it exists, or the disk cannot be written.
    """
    with held(path), _disk_errors_explained(path):
        if path.exists():
            raise SvlError(f"'{path}' exists already; it is never overwritten")
        _remove_scratch_of_killed_processes(path)
        temporary = scratch_beside(path)
        try:
            temporary.mkdir()
            yield temporary
            if path.exists():  # made by something that does not know of our locks
                raise SvlError(f"'{path}' was made by somebody else meanwhile; it is never overwritten")
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_scratch_of_killed_processes(path: Path) -> None:
    """Remove what was left of earlier tries to write `path`, which is held."""
    scratch = re.compile(rf"\.{re.escape(path.name)}\.{UNIQUE}\.incomplete")
    for remains in path.parent.iterdir():
        if scratch.fullmatch(remains.name):
            shutil.rmtree(remains, ignore_errors=True)


@contextmanager
def _disk_errors_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if reason := cannot_write(error):
            raise SvlError(f"cannot write '{path}': {reason}") from error
        raise
