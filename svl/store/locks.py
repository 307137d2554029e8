"""Locks between processes: one holder at a time, and whoever finds a lock taken learns by whom.

The kernel releases a lock when its holder dies. A file system without such locks gets a marker file instead, which the
holder renews; one that waits for it takes it after STALE seconds without renewal, and one that does not wait takes it
if it was not renewed for ABANDONED seconds. All processes that share a lock must see the file system in the same way.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from svl.core.errors import SvlError

NO_KERNEL_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
NOBODY = "another process"  # what is said of a holder without a name
STALE = 60.0  # seconds without renewal, as another process counts them, after which a marker file's holder is gone
ABANDONED = 10 * STALE  # seconds without renewal, by the clock of the file system

UNIQUE = r"[A-Za-z0-9-]*-[0-9]+-[0-9a-f]{16}"  # what `unique_name` gives

_holding: set[tuple[Path, int, int]] = set()  # (path, process, thread): forked children hold nothing


def process_name() -> str:
    """This process as people find it: its number and its host."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def unique_name() -> str:
    """A name (see UNIQUE) that nobody can guess and no other process uses, be it across machines or containers."""
    host = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())
    return f"{host}-{os.getpid()}-{secrets.token_hex(8)}"


class Lock:
    """A lock that one process holds at a time; its file says who.

    Any error of the file system but missing support of locks is an OSError.
    """

    def __init__(self, file: Path):
        self.file = file
        self._lock: BaseFileLock = FileLock(file, thread_local=False, fallback_to_soft=False)

    def acquire(self, on_wait: Callable[[str], None] | None = None) -> bool:
        """Take the lock; whether that worked.

        Where another process has it: gives up, or calls `on_wait` once with its name, and waits.
        """
        if not self._attempt(0):
            if on_wait is None:
                return False
            on_wait(self.holder())
            self._attempt(-1)
        with suppress(OSError):  # only for people
            self.file.write_text(f"{process_name()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        return True

    def _attempt(self, timeout: float) -> bool:
        """Try for so many seconds (-1: for ever)."""
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in NO_KERNEL_LOCKS or isinstance(self._lock, SoftFileLease):
                raise
            marker = self.file.with_name(f"{self.file.name}.marker")
            _remove_abandoned(marker)
            self._lock = SoftFileLease(marker, lease_duration=STALE, thread_local=False)
            return self._attempt(timeout)
        return True

    def holder(self) -> str:
        """Who holds the lock, and since when; NOBODY if no one says so for a second."""
        for _ in range(20):  # it writes its name right after it has taken the lock
            with suppress(OSError, ValueError):
                if text := self.file.read_text():
                    return text
            time.sleep(0.05)
        return NOBODY

    def release(self, remove: bool = False) -> None:
        """Give the lock back; `remove` its file, too (whoever waits for it sees that, and makes a new one)."""
        with suppress(OSError):
            if remove:
                self.file.unlink(missing_ok=True)
            else:
                self.file.write_text("")
        self._lock.release()


def _remove_abandoned(marker: Path) -> None:
    """Remove a marker file whose holder, on whichever host, must be gone."""
    with suppress(OSError):  # there is none, or somebody else was faster
        seen = marker.stat()
        with tempfile.TemporaryFile(dir=marker.parent) as file:
            now = os.fstat(file.fileno()).st_mtime  # hosts' own clocks may differ
        if now - seen.st_mtime > ABANDONED:
            away = marker.with_name(f".{marker.name}.{unique_name()}")
            marker.rename(away)
            if away.stat().st_mtime == seen.st_mtime:
                away.unlink()
            else:  # renewed, or another one's by now
                away.rename(marker)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Within the block, no other process (or thread) holds `path`, a file or folder that need not exist.

    The same thread can hold it again. The folder around it is made if need be, and removed if it is empty afterwards.

    Raises:
        SvlError: if another one holds it; says which, on which host, since when.
    """
    path = Path(os.path.abspath(path))
    mine = (path, os.getpid(), threading.get_ident())
    if mine in _holding:
        yield
        return
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        lock = _lock_beside(path)
    except OSError as error:
        raise SvlError(f"cannot write '{path}': {error.strerror or error}") from error
    _holding.add(mine)
    try:
        yield
    finally:
        _holding.discard(mine)
        lock.release(remove=True)
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def is_free(file: Path) -> bool:
    """Whether nobody holds the lock of this file, which need not exist."""
    if not file.exists():
        return True
    lock = Lock(file)
    if not lock.acquire():
        return False
    lock.release()
    return True


def _lock_beside(path: Path) -> Lock:
    """The lock of `path`, taken, in a folder that is made if need be.

    Raises:
        SvlError: if another process has it.
    """
    lock, nameless = Lock(path.with_name(f".{path.name}.lock")), 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            free = lock.acquire()
        except FileNotFoundError:
            continue  # the last holder has just removed the folder that it had made
        if free:
            return lock
        holder = lock.holder()
        nameless += holder == NOBODY  # most likely it has let go since
        if holder != NOBODY or nameless == 3:
            raise SvlError(f"'{path}' is being written by {holder}")
