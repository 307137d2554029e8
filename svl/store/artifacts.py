"""A content-addressed folder of finished artifacts: the truth of every run, shared between runs and processes.

    <root>/<stage>/<key>/manifest.json + files

* The key is a hash of what a stage reads (its name, schema number, settings, upstream keys), never of device, batch
  size or tracker. Resume is: run again.
* An artifact is built in `<root>/tmp`, together with its manifest, and renamed into place: it is there whole or not
  at all. A killed writer leaves only a temporary folder, swept by the next writer of that key.
* A builder of a long stage may keep what it needs to go on in `unfinished`, where it stays until the artifact is there.
* One lock per key (released by the kernel when its owner dies): of several processes, one computes, the rest wait.
* The manifest holds every file's size and SHA-256, and its own; a damaged artifact is named and computed again. A
  process hashes a file once, and again when its size or times change.
* What a process makes or reads is listed as in use until it ends; cleaning spares it (see in_use).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from svl.core.errors import SvlError
from svl.store.files import cannot_write, digest, file_digest, reason_with_file, remove_path
from svl.store.in_use import lease_artifact, new_lease_lock
from svl.store.layout import (
    LOCKS,
    SCHEMA,
    SCRATCH,
    UNFINISHED,
    files_of_store,
    is_marked,
    lock_name,
    lock_of_scratch,
    mark_store,
)
from svl.store.locks import Lock, unique_name

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MINIMUM_FREE = 16 * 2**20  # bytes that must be free before a stage starts
CREATED = "%Y-%m-%dT%H:%M:%S%z"
# What a manifest holds, and of which type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "key": str,
    "inputs": dict,
    "output": dict,
    "seconds": (int, float),
    "versions": dict,
    "created": str,
    "files": dict,
}


@dataclass(frozen=True)
class Entry:
    """A finished artifact: its folder, its manifest, and whether it was there already."""

    path: Path
    manifest: dict[str, Any]
    reused: bool = True

    @property
    def key(self) -> str:
        """Name of the artifact within its stage."""
        return self.path.name

    @property
    def output(self) -> dict[str, Any]:
        """What the stage returned: small JSON values."""
        return self.manifest["output"]


class Store:
    """See the module. `root` is made on first write.

    Raises:
        SvlError: if `root` is empty.
    """

    def __init__(self, root: Path | str, versions: dict[str, str] | None = None):
        if not str(root).strip():
            raise SvlError("the path of the store is empty: name a folder with paths.store= or SVL_STORE")
        self.root, self.versions = Path(root).expanduser().absolute(), versions or {}

    def make(self, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any] | None]) -> Entry:
        """The artifact of (stage, inputs), built by `build(folder)` if it is not there.

        `build` writes files into the folder and returns small JSON values, kept as the manifest's `output`.

        Raises:
            SvlError: if the disk is full or the store cannot be written, or is no store; nothing half-written stays.
        """
        folder, unfinished = self._folder(stage, inputs), self.unfinished(stage, inputs)
        if (entry := self._find(folder)) is not None:
            shutil.rmtree(unfinished, ignore_errors=True)  # its builder may have been killed right after
            return entry
        with self._explained(stage):
            mark_store(self.root)
            for place in (folder.parent, self.root / SCRATCH, self.root / LOCKS):
                place.mkdir(parents=True, exist_ok=True)
            lease_artifact(self.root, folder)
        with self._locked(stage, folder.name):
            with self._explained(stage):
                if (entry := self.read(folder)) is not None:
                    return entry
                temporary = self._make_room(stage, folder)
            try:
                began = time.perf_counter()
                with self._explained(stage, bugs=True):
                    output = build(temporary) or {}
                with self._explained(stage):
                    manifest = self._write_manifest(temporary, stage, folder.name, inputs, output, began)
                    os.replace(temporary, folder)
                    shutil.rmtree(unfinished, ignore_errors=True)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return Entry(folder, manifest, reused=False)

    def unfinished(self, stage: str, inputs: dict[str, Any]) -> Path:
        """Where the builder of (stage, inputs) may keep what it needs to go on after it was killed.

        A path that may not exist yet. Only the builder uses it, which holds the artifact's lock; it goes with the
        artifact's completion.
        """
        return self.root / UNFINISHED / lock_name(stage, self._folder(stage, inputs).name)

    def get(self, stage: str, inputs: dict[str, Any]) -> Entry | None:
        """The artifact of (stage, inputs) if it is there."""
        return self._find(self._folder(stage, inputs))

    def read(self, folder: Path, warn: bool = True) -> Entry | None:
        """The artifact in `folder`, or None if there is none or it is damaged (named in a warning).

        Raises:
            SvlError: if it cannot be read.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            check_manifest(manifest, folder)
            damaged = [
                name for name, (size, sha) in manifest["files"].items() if not is_intact(folder / name, size, sha)
            ]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            reason = reason_with_file(error.strerror or str(error), error)
            raise SvlError(f"cannot read the artifact {folder}: {reason}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged = [MANIFEST]
        if not damaged:
            return Entry(folder, manifest)
        if warn:
            names = ", ".join(damaged)
            log.warning("artifact %s is damaged (%s): it counts as missing and is computed again", folder, names)
        return None

    def entries(self, stage: str) -> Iterator[Entry]:
        """All finished artifacts of a stage, oldest first."""
        found = [entry for folder in files_of_store(self.root, stage) if (entry := self.read(folder)) is not None]
        yield from sorted(found, key=lambda entry: (entry.manifest["created"], entry.key))

    @contextmanager
    def scratch(self, what: str) -> Iterator[Path]:
        """Within the block, a path below the store for temporary files, which nobody else uses and cleaning spares.

        `what` is a word of small letters. The block removes what it makes there.
        """
        with self._explained(what):
            mark_store(self.root)
            (self.root / SCRATCH).mkdir(parents=True, exist_ok=True)
            lock = new_lease_lock(self.root)
        try:
            yield self.root / SCRATCH / f"{what}.{lock.file.name}"
        finally:
            lock.release(remove=True)

    # ------------------------------------------------------------------------------------------------ helpers

    def _folder(self, stage: str, inputs: dict[str, Any]) -> Path:
        return self.root / stage / digest([stage, SCHEMA[stage], inputs])

    def _find(self, folder: Path) -> Entry | None:
        """The artifact in `folder`, listed as in use before it is looked for: cleaning looks at the list last."""
        if is_marked(self.root):  # cleaning touches no other
            with self._explained(folder.parent.name):
                lease_artifact(self.root, folder)
        return self.read(folder, warn=False)

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[None]:
        """Hold the lock of an artifact; says so if another process has it."""
        lock = Lock(self.root / LOCKS / lock_name(stage, key))
        with self._explained(stage):
            lock.acquire(lambda holder: log.info("  waiting for %s, which works on %s", holder, lock.file.name))
        try:
            yield
        finally:
            lock.release()

    def _make_room(self, stage: str, folder: Path) -> Path:
        """A new temporary folder, after removing a damaged artifact and what killed writers left of it."""
        name = lock_name(stage, folder.name)
        for remains in (folder, *files_of_store(self.root, SCRATCH)):
            if remains is folder or lock_of_scratch(remains.name) == name:
                with suppress(OSError):  # what matters is found when the artifact is renamed into place
                    remove_path(remains)
        if shutil.disk_usage(self.root).free < MINIMUM_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary = self.root / SCRATCH / f"{name}.{unique_name()}"
        temporary.mkdir()
        return temporary

    def _write_manifest(
        self, folder: Path, stage: str, key: str, inputs: dict[str, Any], output: dict[str, Any], began: float
    ) -> dict[str, Any]:
        body = {
            "stage": stage,
            "key": key,
            "inputs": inputs,
            "output": output,
            "seconds": round(time.perf_counter() - began, 3),
            "versions": self.versions,
            "created": time.strftime(CREATED),
            "files": {
                str(file.relative_to(folder)): [file.stat().st_size, file_digest(file)]
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            },
        }
        manifest: dict[str, Any] = json.loads(json.dumps(body))  # as any later reader gets it
        manifest["digest"] = digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return manifest

    @contextmanager
    def _explained(self, stage: str, bugs: bool = False) -> Iterator[None]:
        """Within the block, errors of the file system become one line; with `bugs`, other OSErrors pass as they are."""
        try:
            yield
        except Exception as error:
            reason = cannot_write(error)
            if reason is None and isinstance(error, OSError) and not bugs:
                reason = reason_with_file(error.strerror or str(error), error)
            if reason is None:
                raise
            raise SvlError(
                f"cannot write stage '{stage}' to the store {self.root}: {reason}; finished stages are kept, so "
                "free some space (or set paths.store) and run again"
            ) from error


def check_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Raise ValueError (or what Python raises on odd types) unless a manifest is whole, and that of `folder`."""
    sealed = {name: value for name, value in manifest.items() if name != "digest"}
    # up to version 0.1.0, the digest was of these parts only
    older = [manifest[name] for name in ("inputs", "output", "files")]
    if manifest["digest"] not in (digest(sealed), digest(older)):
        raise ValueError("the digest differs")
    for name, kind in FIELDS.items():
        if not isinstance(manifest[name], kind):
            raise TypeError(f"{name} is no {kind}")
    if (manifest["stage"], manifest["key"]) != (folder.parent.name, folder.name):
        raise ValueError("it is another artifact's")
    datetime.strptime(manifest["created"], CREATED)
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError("it names files elsewhere")


def is_intact(file: Path, size: int, sha: str) -> bool:
    """Whether a file has that size and SHA-256."""
    return file.is_file() and file.stat().st_size == size and file_digest(file) == sha
