"""What running processes use of a store, so that cleaning spares it.

Each process has a file in `<root>/in-use` that it locks as long as it lives, and beside it the list of the artifacts
that it has made or read. However long a process runs, what it lists stays; once it is gone, its lock is free.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from svl.store.layout import IN_USE, files_of_store
from svl.store.locks import Lock, is_free, unique_name

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

_leases: dict[tuple[Path, int], Lease] = {}  # (root, process): a forked child has its own


class Lease:
    """The artifacts that this process uses, listed until it ends."""

    def __init__(self, root: Path):
        self._lock = new_lease_lock(root)
        self._list = self._lock.file.with_name(f"{self._lock.file.name}.keys")
        self._listed: set[str] = set()

    def add(self, folder: Path) -> None:
        """List the artifact in `folder`, which need not exist yet."""
        name = f"{folder.parent.name}/{folder.name}"
        if name not in self._listed:
            with open(self._list, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            self._listed.add(name)

    def end(self) -> None:
        """Use none of them any more."""
        self._list.unlink(missing_ok=True)
        self._lock.release(remove=True)


def lease_artifact(root: Path, folder: Path) -> None:
    """List an artifact as used by this process; not in a store that it may only read."""
    me = (root, os.getpid())
    try:
        if me not in _leases:
            _leases[me] = Lease(root)
        _leases[me].add(folder)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise


def end_lease(root: Path) -> None:
    """Let cleaning remove what this process has made or read so far; the end of the process does so, too."""
    if lease := _leases.pop((root, os.getpid()), None):
        lease.end()


def new_lease_lock(root: Path) -> Lock:
    """A lock of a name of its own, taken: as long as it is held, scratch that ends in `.<name>` is in use."""
    (root / IN_USE).mkdir(parents=True, exist_ok=True)
    while True:
        lock = Lock(root / IN_USE / unique_name())
        if lock.acquire():  # else cleaning has just looked at it
            return lock


def artifacts_in_use(root: Path) -> set[str]:
    """The artifacts that running processes use, as stage/key."""
    used: set[str] = set()
    for file in files_of_store(root, IN_USE):
        if file.suffix == ".keys" and not is_unused(root, file.stem):
            with suppress(FileNotFoundError):
                used |= set(file.read_text(encoding="utf-8").splitlines())
    return used


def is_unused(root: Path, name: str) -> bool:
    """Whether the process that took `name` (a lease's, or the end of a scratch path's) is gone."""
    return is_free(root / IN_USE / name.rpartition(".")[2])
