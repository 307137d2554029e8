"""Checkpoints on the Hugging Face Hub: downloading and uploading."""

from __future__ import annotations

import os
from pathlib import Path

from svl.core.errors import SvlError, explained
from svl.models.weight_files import CONVERT, PICKLES, has_weight_files


def local_checkpoint(source: str | Path, revision: str | None = None, pickles: bool = False) -> Path:
    """The folder of a checkpoint: itself, or a hub id's files, downloaded if they are not yet here.

    Weights in safetensors files only; with `pickles`, those, too.

    Raises:
        SvlError: if there is no such folder or id, or it has no safetensors files where only these are wanted.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Path(path).absolute()
    if path.startswith((".", "/")) or path.count("/") != 1:
        raise SvlError(f"source: '{source}' is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    others = (*(() if pickles else PICKLES), ".gguf", ".onnx", ".h5", ".msgpack")
    ignored = [f"*{suffix}{end}" for suffix in others for end in ("", ".index.json")]
    try:
        folder = Path(snapshot_download(path, revision=revision, ignore_patterns=[*ignored, "*/*"]))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = type(error).__name__
        raise SvlError(f"source: '{source}' is no local folder, and the hub does not give it ({reason})") from error
    if not pickles and not has_weight_files(folder):
        raise SvlError(
            f"'{source}' has no safetensors files on the hub; if its weights are pickles, {CONVERT.format(source)}"
        )
    return folder


def hub_id(source: str | Path) -> str | None:
    """The hub id that `local_checkpoint` would take a source for; None of a folder."""
    return None if os.path.isdir(os.path.expanduser(source)) else str(source)


def check_hub_access(repo: str) -> None:
    """Raise SvlError unless `repo` is a name for a repository, and the Hub knows who is asking."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SvlError(f"push_to_hub: {error}") from error
    with explained("push_to_hub: the Hub refuses"):
        HfApi().whoami()


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload an exported checkpoint to the Hub, into a repository made for it if need be; its address.

    Raises:
        SvlError: if the Hub refuses.
    """
    from huggingface_hub import HfApi

    with explained(f"push_to_hub: the Hub refuses, but the export is in '{folder}'"):
        address = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Pruned by svl")
    return str(address)
