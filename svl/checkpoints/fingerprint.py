"""What identifies a checkpoint: the content of its folder, or a commit on the hub.

Hashing a folder reads all of it once: about 2 s per GB and core. Hashes of files of 64 MB and more are
remembered by path, size, inode and times, so that the next run does not read them again. Whoever changes bytes in place
and puts all of these back (or has a file system without inodes and change times) sets model.full_hash=true (for
everything that a process does: SVL_FULL_HASH=1): then every byte is read again in every process.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from svl.core.errors import SvlError
from svl.models.hub_snapshot import find_hub_snapshot
from svl.models.weight_files import check_no_adapter, checkpoint_files, find_weight_files
from svl.store.files import digest, file_digest, write_text_whole

LARGE = 64 * 2**20  # bytes of a file whose hash is remembered


def checkpoint_fingerprint(path: str, revision: str | None, cache: Path, full_hash: bool = False) -> str:
    """Identity of a checkpoint: of its files' content for a folder, `owner/name@commit` for a hub id.

    A folder's hash covers every file but readme and hidden ones (downloads keep their time stamps in `.cache`).

    Args:
        path: folder or hub id.
        revision: hub branch, tag or commit.
        cache: folder that remembers hashes of large files.
        full_hash: hash large files again, too (as with SVL_FULL_HASH=1).

    Raises:
        SvlError: if the folder has no config.json, its weights are not all its own (see weight_files), or the hub (or
            its local cache) does not know the id.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{find_hub_snapshot(path, revision).commit}"
    check_no_adapter(folder, os.listdir(folder))
    if not (folder / "config.json").is_file():
        raise SvlError(f"model.path: '{path}' has no config.json, so it is no checkpoint")
    find_weight_files(folder)
    remember = None if full_hash or os.environ.get("SVL_FULL_HASH") == "1" else cache
    try:
        return digest({name: _file_hash(folder / name, remember) for name in checkpoint_files(folder)})
    except OSError as error:
        raise SvlError(f"model.path: cannot read '{path}': {error}") from error


def _file_hash(file: Path, cache: Path | None) -> str:
    """SHA-256 of a file; of a large one as `cache` has it, if there is one."""
    info = file.stat()
    if cache is None or info.st_size < LARGE:
        return file_digest(file)
    state = [str(file.absolute()), info.st_size, info.st_mtime_ns, info.st_ino, info.st_ctime_ns]
    note = cache / digest(state)
    try:
        known = note.read_text(encoding="utf-8")
    except (OSError, ValueError):
        known = ""
    if not re.fullmatch(r"[0-9a-f]{64}", known):
        known = file_digest(file)
        with suppress(OSError):  # of a store that may only be read: it is hashed again the next time
            cache.mkdir(parents=True, exist_ok=True)
            write_text_whole(note, known)
    return known
