"""What identifies a checkpoint: the content of its folder, or a commit on the hub.

Hashing a folder reads all of it once: about 2 s per GB. Hashes of files of 64 MB and more are remembered by path, size,
inode and times, so that the next run does not read them again. Whoever changes bytes in place and puts all of these
back (or has a file system without inodes and change times) sets SVL_FULL_HASH=1: then every byte is read again in
every process.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from svl.core.errors import SvlError
from svl.models.weight_files import check_no_adapter, find_weight_files
from svl.store.files import digest, file_digest, write_text_whole

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

LARGE = 64 * 2**20  # bytes of a file whose hash is remembered
BUSY, BUSY_TRIES, LONGEST_WAIT = 429, 5, 60  # status of a hub that is asked too much; tries; seconds before the next


def checkpoint_fingerprint(path: str, revision: str | None, cache: Path, full_hash: bool = False) -> str:
    """Identity of a checkpoint: of its files' content for a folder, `owner/name@commit` for a hub id.

    A folder's hash covers every file but readme and hidden ones (downloads keep their time stamps in `.cache`).

    Args:
        path: folder or hub id.
        revision: hub branch, tag or commit.
        cache: folder that remembers hashes of large files.
        full_hash: hash large files again, too (as SVL_FULL_HASH=1).

    Raises:
        SvlError: if the folder has no config.json, its weights are not all its own (see weight_files), or the hub (or
            its local cache) does not know the id.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise SvlError(f"model.path: '{path}' is neither a folder nor a hub id (owner/name)")
        return _hub_commit(path, revision)
    if not (folder / "config.json").is_file():
        raise SvlError(f"model.path: '{path}' has no config.json, so it is no checkpoint")
    find_weight_files(folder)
    remember = None if full_hash or os.environ.get("SVL_FULL_HASH") == "1" else cache
    try:
        return digest({name: _file_hash(folder / name, remember) for name in _hashed_files(folder)})
    except OSError as error:
        raise SvlError(f"model.path: cannot read '{path}': {error}") from error


def _hashed_files(folder: Path) -> list[str]:
    """Names of the files that count, in folders, too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() != ".md")
    names = [file.relative_to(folder).as_posix() for file in files]
    return [name for name in names if not name.startswith(".") and "/." not in name]


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


def _hub_commit(repo: str, revision: str | None) -> str:
    """The commit that a hub id stands for, as `owner/name@commit`; without a network, that of the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        info = _model_info(repo, revision)
    except HFValidationError as error:
        raise SvlError(f"model.path: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(cached, str):
            check_no_adapter(repo, os.listdir(Path(cached).parent))
            return f"{repo}@{Path(cached).parent.name}"
        raise SvlError(
            f"model.path: '{repo}' is no local folder, and the hub does not answer for it ({type(error).__name__})"
        ) from error
    check_no_adapter(repo, [file.rfilename for file in info.siblings or ()])
    _remember_commit(repo, revision)
    return f"{repo}@{info.sha}"


def _model_info(repo: str, revision: str | None) -> ModelInfo:
    """What the hub says of a repository; a hub that is busy is asked again when it says."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(BUSY_TRIES):
        try:
            return HfApi().model_info(repo, revision=revision)
        except HfHubHTTPError as error:
            if error.response.status_code != BUSY or attempt + 1 == BUSY_TRIES:
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(min(LONGEST_WAIT, int(asked) if asked.isdigit() else 2**attempt))
    raise AssertionError("the last try returns or raises")


def _remember_commit(repo: str, revision: str | None) -> None:
    """Let the local cache know which commit a branch or tag is, so that the run can be repeated without a network.

    Raises:
        SvlError: if the repository may not be read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HTTPError, OfflineModeIsEnabled

    with suppress(EntryNotFoundError, HTTPError, OfflineModeIsEnabled, OSError):  # loading says why
        try:
            hf_hub_download(repo, "config.json", revision=revision)
        except GatedRepoError as error:
            raise SvlError(
                f"model.path: '{repo}' is gated: accept its licence on the hub, and log in ('hf auth login')"
            ) from error
