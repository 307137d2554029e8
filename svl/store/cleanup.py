"""Cleaning a store of what no run will ever read: `svl-report gc`. Only in a marked store, and only what is its own."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import humanize

from svl.core.errors import SvlError
from svl.store.artifacts import Store
from svl.store.contents import Artifact, check_store_exists, list_artifacts
from svl.store.files import remove_path
from svl.store.in_use import artifacts_in_use, is_unused
from svl.store.layout import (
    IN_USE,
    LOCKS,
    SCHEMA,
    SCRATCH,
    UNFINISHED,
    check_marked,
    files_of_store,
    lock_name,
    lock_of_scratch,
)
from svl.store.locks import Lock, is_free

DERIVED = (
    "stats",
    "plan",
    "patch",
    "recover",
    "overlap",
    "score",
    "efficiency",
)  # a run refers to them, directly or through each other
ABOUT_A_RUN = ("track", "gap")
RECENT = 86400  # seconds in which unfinished stages, and scratch of an older version without leases, stay


@dataclass(frozen=True)
class Leftover:
    """Something that can go.

    Attributes:
        path: where it is.
        reason: why it can go.
        lock: of whoever works on it.
        can_go: whether that still holds, once its lock is held.
        artifact: stage/key of an artifact that is whole, so that a process may begin to use it without its lock.
    """

    path: Path
    reason: str
    lock: Path
    can_go: Callable[[], bool]
    artifact: str | None = None

    @cached_property
    def bytes(self) -> int:
        """Size of its files; nothing of a link."""
        if self.path.is_symlink():
            return 0
        files = [self.path] if self.path.is_file() else self.path.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())


def find_leftovers(store: Store, unreferenced: bool, days: float) -> Iterator[Leftover]:
    """What can be removed, each thing once; nothing that a running process uses.

    Half-written artifacts, scratch of processes that are gone, damaged artifacts, and locks that nobody holds. If
    `unreferenced`, also artifacts older than so many days that neither a run nor a running process refers to, directly
    or through others. What is drawn from a hub, assembled checkpoints, checks, and measurements of searches stay: any
    later run may read them.

    Raises:
        SvlError: if there is no store, or it is not marked as one.
    """
    check_store_exists(store)
    check_marked(store.root)
    locks = store.root / LOCKS
    yield from _find_scratch(store.root)
    damaged = set()
    for stage in SCHEMA:
        for folder in files_of_store(store.root, stage):
            is_damaged = partial(_is_damaged, store, folder)
            if is_damaged():
                damaged.add(folder)
                yield Leftover(folder, "damaged", locks / lock_name(stage, folder.name), is_damaged)
    for artifact in unreferenced_artifacts(store) if unreferenced else ():
        if artifact.age > 86400 * days and artifact.path not in damaged:
            lock = locks / lock_name(artifact.stage, artifact.key)
            name = f"{artifact.stage}/{artifact.key}"
            yield Leftover(artifact.path, "no run refers to it", lock, artifact.path.exists, name)
    for file in files_of_store(store.root, LOCKS):
        yield Leftover(file, "a lock that nobody holds", file.with_name(file.name.removesuffix(".marker")), file.exists)


def _find_scratch(root: Path) -> Iterator[Leftover]:
    """Half-written artifacts, and what processes that are gone have left."""
    gone = "half-written, by a process that is gone"
    for path in files_of_store(root, SCRATCH):
        if lock := lock_of_scratch(path.name):
            yield Leftover(path, gone, root / LOCKS / lock, path.exists)
        elif "." in path.name and is_unused(root, path.name):
            yield Leftover(path, gone, root / IN_USE / path.suffix[1:], path.exists)
        elif "." not in path.name and _is_old(path):  # of a version without leases
            yield Leftover(path, gone, root / LOCKS / f"gc-{os.getpid()}", path.exists)
    for path in files_of_store(root, UNFINISHED):
        if _is_old(path):
            yield Leftover(path, "of a stage that nobody has gone on with", root / LOCKS / path.name, path.exists)
    for file in files_of_store(root, IN_USE):
        name = file.name.partition(".")[0]
        if is_unused(root, name):
            yield Leftover(file, "a list of a process that is gone", root / IN_USE / name, file.exists)


def _is_old(path: Path) -> bool:
    newest = max(inner.stat().st_mtime for inner in (path, *path.rglob("*")))
    return time.time() - newest > RECENT


def _is_damaged(store: Store, folder: Path) -> bool:
    return folder.exists() and store.read(folder, warn=False) is None


def unreferenced_artifacts(store: Store) -> list[Artifact]:
    """Derived artifacts that no run or running process refers to, and what is about runs that are gone."""
    every = list(list_artifacts(store))
    used = artifacts_in_use(store.root)
    by_key = {artifact.key: artifact for artifact in every}
    runs = {artifact.key for artifact in every if artifact.stage == "run"}
    in_use = {artifact.key for artifact in every if f"{artifact.stage}/{artifact.key}" in used}
    reached = runs | in_use
    new = set(reached)
    while new:
        new = {word for key in new for word in by_key[key].references if word in by_key} - reached
        reached |= new
    derived = [artifact for artifact in every if artifact.stage in DERIVED and artifact.key not in reached]
    about = [artifact for artifact in every if artifact.stage in ABOUT_A_RUN and artifact.key not in in_use]
    return derived + [artifact for artifact in about if not artifact.references & runs]


def remove_leftover(store: Store, leftover: Leftover) -> bool:
    """Remove a leftover, in one step for everyone else; False if a process holds or uses it, or it is whole again."""
    leftover.lock.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(leftover.lock)
    if not lock.acquire():
        return False
    try:
        if leftover.path == leftover.lock:
            return True
        return leftover.can_go() and _move_away(store, leftover)
    finally:
        lock.release(remove=True)


def _move_away(store: Store, leftover: Leftover) -> bool:
    """Move a leftover out of sight and remove it, unless a process has begun to use it.

    A process first lists what it uses, then reads it. So one that has read this before it was moved is on the list by
    now; one that comes later does not find it, and waits for the lock to make it anew.
    """
    with store.scratch("removed") as away:
        leftover.path.rename(away)
        if leftover.artifact and leftover.artifact in artifacts_in_use(store.root):
            away.rename(leftover.path)
            return False
        remove_path(away)
    return True


def clean_store(store: Store, unreferenced: bool, days: float, remove: bool) -> Iterator[str]:
    """Lines of text: what goes (or would go, unless `remove`), and how much that frees.

    Raises:
        SvlError: if there is no store, it is not marked as one, or its disk refuses.
    """
    try:
        yield from _clean(store, unreferenced, days, remove)
    except OSError as error:
        raise SvlError(f"cannot clean the store {store.root}: {error}") from error


def _clean(store: Store, unreferenced: bool, days: float, remove: bool) -> Iterator[str]:
    freed, kept = 0, 0
    reasons: Counter[str] = Counter()
    for leftover in list(find_leftovers(store, unreferenced, days)):
        size = leftover.bytes
        if not (remove_leftover(store, leftover) if remove else is_free(leftover.lock)):
            kept += 1
            continue
        freed += size
        reasons[leftover.reason] += 1
        if leftover.path.parent.name not in (LOCKS, IN_USE):
            yield f"{leftover.path.relative_to(store.root)}  {humanize.naturalsize(size)}  {leftover.reason}"
    if kept:
        yield f"{kept} kept: another process is at work on them"
    if not reasons:
        yield f"nothing to remove in {store.root}"
        return
    count = ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
    what = "removed" if remove else "would be removed"
    yield f"{what}: {count}; {humanize.naturalsize(freed)} in {store.root}"
    if not remove:
        yield "say yes=true to remove them"
