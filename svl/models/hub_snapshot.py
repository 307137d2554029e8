"""What the hub has of a model before anything of it is downloaded: its commit, and its files with their sizes."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core.errors import SvlError
from svl.models.weight_files import PICKLES, check_no_adapter

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

BUSY, BUSY_TRIES, LONGEST_WAIT = 429, 5, 60  # status of a hub that is asked too much; tries; seconds before the next


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a repository.

    Attributes:
        repo: its hub id.
        commit: 40 hex digits.
        files: sizes in bytes by name; None where the hub does not tell.
        cached: whether it is what the local cache has, because the hub did not answer.
        gated: whether the hub asks for an agreement first.
        card: the metadata of its model card.
    """

    repo: str
    commit: str
    files: dict[str, int | None]
    cached: bool = False
    gated: bool = False
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int | None:
        """Size of all files that its weights may be read from, at most; None where it is not known."""
        for suffixes in ((".safetensors",), PICKLES):
            sizes = [size for name, size in self.files.items() if name.endswith(suffixes)]
            if sizes:
                known = [size for size in sizes if size is not None]
                return sum(known) if len(known) == len(sizes) else None
        return None


def find_hub_snapshot(repo: str, revision: str | None) -> HubSnapshot:
    """What a hub id stands for; without a network, what the local cache has of it.

    Raises:
        SvlError: if it is no hub id, neither knows it, or its weights come with an adapter.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise SvlError(f"model.path: '{repo}' is neither a folder nor a hub id (owner/name)")
    try:
        info = _model_info(repo, revision)
        found = HubSnapshot(
            repo,
            str(info.sha),
            {file.rfilename: file.size for file in info.siblings or ()},
            gated=bool(info.gated),
            card=info.card_data.to_dict() if info.card_data else {},
        )
        _remember_commit(repo, revision)
    except HFValidationError as error:
        raise SvlError(f"model.path: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise SvlError(
                f"model.path: '{repo}' is no local folder, and the hub does not answer for it ({type(error).__name__})"
            ) from error
        folder = Path(cached).parent
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        found = HubSnapshot(repo, folder.name, {name: path.stat().st_size for name, path in files.items()}, cached=True)
    check_no_adapter(repo, found.files)
    return found


def _model_info(repo: str, revision: str | None) -> ModelInfo:
    """What the hub says of a repository; a hub that is busy is asked again when it says."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(BUSY_TRIES):
        try:
            return HfApi().model_info(repo, revision=revision, files_metadata=True)
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
