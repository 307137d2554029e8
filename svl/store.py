"""A content-addressed folder of finished artifacts: the truth of every run, shared between runs and processes.

    <root>/<stage>/<key>/manifest.json + files

* The key is a hash of what a stage reads (its name, schema number, settings, upstream keys), never of device, batch
  size or tracker. Resume is: run again.
* An artifact is built in `<root>/tmp`, together with its manifest, and renamed into place: it is there whole or not
  at all. A killed writer leaves only a temporary folder, swept by the next writer of that key.
* One lock per key (released by the kernel when its owner dies): of several processes, one computes, the rest wait.
* The manifest holds every file's size and SHA-256, and its own; a damaged artifact is named and computed again. A
  process hashes a file once, and again when its size or times change.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from svl.core import SvlError

log = logging.getLogger(__name__)

# Raise a stage's number when its meaning changes: older artifacts are then no longer found.
SCHEMA = {
    "checkpoint": 1,
    "data": 1,
    "stats": 1,
    "probe": 1,
    "plan": 1,
    "patch": 1,
    "check": 1,
    "score": 1,
    "efficiency": 1,
    "run": 1,
    "gap": 1,
    "track": 1,
}
T = TypeVar("T")
MINIMUM_FREE = 16 * 2**20  # bytes that must be free before a stage starts


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _seal(manifest: dict[str, Any]) -> str:
    return digest([manifest[part] for part in ("inputs", "output", "files")])


def _is(path: Path, size: int, sha: str) -> bool:
    return path.is_file() and path.stat().st_size == size and file_digest(path) == sha


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


def cannot_write(error: BaseException) -> str | None:
    """Why `error` means that the disk cannot be written, or None. (safetensors hides the number in its text.)"""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
        if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
            file = getattr(error, "filename", None)
            return os.strerror(code) + (f" ('{file}')" if file else "")
    return None


class Store:
    """See the module. `root` is made on first write."""

    def __init__(self, root: Path | str, versions: dict[str, str] | None = None):
        self.root, self.versions = Path(root).expanduser().absolute(), versions or {}

    def make(self, stage: str, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any] | None]) -> Entry:
        """The artifact of (stage, inputs), built by `build(folder)` if it is not there.

        `build` writes files into the folder and returns small JSON values, kept as the manifest's `output`.

        Raises:
            SvlError: if the disk is full or the store cannot be written; nothing half-written stays.
        """
        folder = self._place(stage, inputs)
        if (entry := self.read(folder, warn=False)) is not None:
            return entry
        temporary = self.root / "tmp" / f"{stage}-{folder.name}"
        try:
            for place in (folder.parent, temporary.parent, self.root / "lock"):
                place.mkdir(parents=True, exist_ok=True)
            with self._lock(f"{stage}-{folder.name}"):
                if (entry := self.read(folder)) is not None:
                    return entry
                for remains in (folder, temporary):  # a damaged artifact, a killed writer's
                    shutil.rmtree(remains, ignore_errors=True)
                if shutil.disk_usage(self.root).free < MINIMUM_FREE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                temporary.mkdir()
                try:
                    began = time.perf_counter()
                    output = build(temporary) or {}
                    body = {
                        "stage": stage,
                        "key": folder.name,
                        "inputs": inputs,
                        "output": output,
                        "seconds": round(time.perf_counter() - began, 3),
                        "versions": self.versions,
                        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                        "files": {
                            str(p.relative_to(temporary)): [p.stat().st_size, file_digest(p)]
                            for p in sorted(temporary.rglob("*"))
                            if p.is_file()
                        },
                    }
                    manifest = json.loads(json.dumps(body))  # as any later reader gets it
                    manifest["digest"] = _seal(manifest)
                    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
                    os.replace(temporary, folder)
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
                return Entry(folder, manifest, reused=False)
        except Exception as error:
            if reason := cannot_write(error):
                raise SvlError(
                    f"cannot write stage '{stage}' to the store {self.root}: {reason}; finished stages are kept, so "
                    "free some space (or set paths.store) and run again"
                ) from error
            raise

    def get(self, stage: str, inputs: dict[str, Any]) -> Entry | None:
        """The artifact of (stage, inputs) if it is there."""
        return self.read(self._place(stage, inputs), warn=False)

    def _place(self, stage: str, inputs: dict[str, Any]) -> Path:
        return self.root / stage / digest([stage, SCHEMA[stage], inputs])

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold the lock `name`; says so if another process has it."""
        lock = FileLock(self.root / "lock" / name)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.info("  waiting for another process, which works on %s", name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def read(self, folder: Path, warn: bool = True) -> Entry | None:
        """The artifact in `folder`, or None if there is none or it is damaged (named in a warning)."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            intact = manifest["digest"] == _seal(manifest)
            bad = [name for name, (size, sha) in manifest["files"].items() if not _is(folder / name, size, sha)]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            intact, bad = False, []
        if intact and not bad:
            return Entry(folder, manifest)
        if warn:
            names = ", ".join(bad or ["manifest.json"])
            log.warning("artifact %s is damaged (%s): it counts as missing and is computed again", folder, names)
        return None

    def entries(self, stage: str) -> Iterator[Entry]:
        """All finished artifacts of a stage, oldest first."""
        found = [e for p in (self.root / stage).glob("*/manifest.json") if (e := self.read(p.parent)) is not None]
        yield from sorted(found, key=lambda e: (e.manifest["created"], e.key))


def checkpoint_fingerprint(path: str, revision: str | None, cache: Path) -> str:
    """Identity of a checkpoint: of its files' content for a folder, `owner/name@commit` for a hub id.

    A folder's hash covers every file but readme and hidden ones (downloads keep their time stamps in `.cache`); hashes
    of large files are remembered in `cache` by path, size and modification time.

    Raises:
        SvlError: if the folder has no config.json, or the hub (or its local cache) does not know the id.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise SvlError(f"model.path: '{path}' is neither a folder nor a hub id (owner/name)")
        return _hub_commit(path, revision)
    if not (folder / "config.json").is_file():
        raise SvlError(f"model.path: '{path}' has no config.json, so it is no checkpoint")
    hashes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() != ".md"):
        name, info = file.relative_to(folder).as_posix(), file.stat()
        if name.startswith(".") or "/." in name:
            continue
        if info.st_size < 64 * 2**20:
            hashes[name] = file_digest(file)
            continue
        note = cache / digest([str(file.absolute()), info.st_size, info.st_mtime_ns])
        if not note.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            scratch = note.with_suffix(f".{os.getpid()}")
            scratch.write_text(file_digest(file))
            os.replace(scratch, note)
        hashes[name] = note.read_text()
    return digest(hashes)


def _hub_commit(repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        return f"{repo}@{HfApi().model_info(repo, revision=revision).sha}"
    except HFValidationError as error:
        raise SvlError(f"model.path: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(cached, str):
            return f"{repo}@{Path(cached).parent.name}"
        raise SvlError(
            f"model.path: '{repo}' is no local folder, and the hub does not answer for it ({type(error).__name__})"
        ) from error
