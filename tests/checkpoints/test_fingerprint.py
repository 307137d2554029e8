"""What identifies a checkpoint: every byte that is loaded, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers.exports import as_hub_cache
from helpers.races import race
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import save_file

from svl.checkpoints import fingerprint
from svl.checkpoints.fingerprint import checkpoint_fingerprint
from svl.core import SvlError


@pytest.fixture
def checkpoint_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("sub/extra.json", "README.md"):
        (folder / name).write_text(f"content of {name}")
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    return folder


def test_fingerprint_changes_with_content_only(checkpoint_folder, tmp_path):
    def fingerprint(folder=checkpoint_folder):
        return checkpoint_fingerprint(str(folder), None, tmp_path / "cache")

    first = fingerprint()
    os.utime(checkpoint_folder / "model.safetensors", (1, 1))
    (checkpoint_folder / "README.md").write_text("another card")
    (checkpoint_folder / ".cache" / "huggingface").mkdir(parents=True)
    (checkpoint_folder / ".cache" / "huggingface" / "config.json.metadata").write_text("downloaded at 10:00")
    assert fingerprint() == first
    checkpoint_folder = checkpoint_folder.rename(tmp_path / "moved")
    assert fingerprint(checkpoint_folder) == first

    seen = {first}
    save_file({"a": torch.ones(3)}, checkpoint_folder / "model.safetensors")  # of the same size
    seen.add(fingerprint(checkpoint_folder))
    for name in ("sub/extra.json", "new.json"):
        (checkpoint_folder / name).write_text("")
        seen.add(fingerprint(checkpoint_folder))
    (checkpoint_folder / "new.json").rename(checkpoint_folder / "newer.json")
    seen.add(fingerprint(checkpoint_folder))
    assert len(seen) == 5


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read in full."""
    names = []

    def read(path: Path) -> str:
        names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(fingerprint, "file_digest", read)
    monkeypatch.setattr(fingerprint, "LARGE", 64)
    return names


def test_large_files_are_hashed_once(checkpoint_folder, tmp_path, hashed):
    def of_folder(**options):
        hashed.clear()
        return checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache", **options)

    large = checkpoint_folder / "model.safetensors"
    first = of_folder()
    assert large.name in hashed
    assert of_folder() == first
    assert large.name not in hashed
    assert of_folder(full_hash=True) == first
    assert large.name in hashed
    before = large.stat()
    with open(large, "r+b") as file:  # in place: only the time of change of the inode tells
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert of_folder() != first


def test_every_byte_is_read_again_if_the_environment_says_so(checkpoint_folder, tmp_path, hashed, monkeypatch):
    for _ in range(2):
        checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")
    assert hashed.count("model.safetensors") == 1
    monkeypatch.setenv("SVL_FULL_HASH", "1")
    checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")
    assert hashed.count("model.safetensors") == 2


@pytest.mark.parametrize("note", ["", "half of a ha", "g" * 64, "\xff"])
def test_torn_notes_are_written_anew(note, checkpoint_folder, tmp_path, hashed):
    first = checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_text()
    file.write_bytes(note.encode("latin-1"))
    assert checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache") == first
    assert file.read_text() == whole


def test_notes_of_two_processes_are_whole(checkpoint_folder, tmp_path, monkeypatch):
    """In 20 rounds, both hash the same large file for the first time."""
    monkeypatch.setattr(fingerprint, "LARGE", 64)
    expected = checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "alone")
    sha = hashlib.sha256((checkpoint_folder / "model.safetensors").read_bytes()).hexdigest()
    found = race(lambda number, _: checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / str(number)))
    assert found == [[expected] * 2] * 20
    for number in range(20):
        (note,) = (tmp_path / str(number)).iterdir()
        assert note.read_text() == sha


# ------------------------------------------------------------------------------ what is hashed is what is read


def with_index(folder: Path, file: str) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))


@pytest.mark.parametrize("file", ["../x.safetensors", ".x.safetensors", "sub/.x.safetensors", "/x.safetensors"])
def test_weights_that_are_not_hashed_are_refused(file, checkpoint_folder, tmp_path):
    with_index(checkpoint_folder, file)
    place = tmp_path / "x.safetensors" if file.startswith("/") else checkpoint_folder / file
    save_file({"a": torch.zeros(3)}, place)
    if file.startswith("/"):
        with_index_at = {"weight_map": {"a": str(place)}}
        (checkpoint_folder / "model.safetensors.index.json").write_text(json.dumps(with_index_at))
    with pytest.raises(SvlError, match="lies outside the folder or is hidden"):
        checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")


def test_weights_in_folders_are_hashed(checkpoint_folder, tmp_path):
    with_index(checkpoint_folder, "sub/x.safetensors")
    save_file({"a": torch.zeros(3)}, checkpoint_folder / "sub" / "x.safetensors")
    first = checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")
    save_file({"a": torch.ones(3)}, checkpoint_folder / "sub" / "x.safetensors")
    assert checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache") != first


def test_links_out_of_the_folder_are_refused_but_those_of_the_hub_cache(checkpoint_folder, tmp_path):
    expected = checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")
    (checkpoint_folder / "sub" / "extra.json").rename(tmp_path / "extra.json")
    flat = checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")
    (checkpoint_folder / "sub").rmdir()
    snapshot = as_hub_cache(checkpoint_folder, tmp_path / "hub")
    assert checkpoint_fingerprint(str(snapshot), None, tmp_path / "cache") == flat != expected
    (tmp_path / "link").symlink_to(snapshot)
    assert checkpoint_fingerprint(str(tmp_path / "link"), None, tmp_path / "cache") == flat
    (checkpoint_folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (checkpoint_folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(SvlError, match="lies outside the folder"):
        checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")


@pytest.mark.parametrize("lacks", [None, "config.json", "model.safetensors"])
def test_adapters_are_refused(lacks, checkpoint_folder, tmp_path):
    (checkpoint_folder / "adapter_config.json").write_text("{}")
    if lacks:  # as a folder of nothing but an adapter does
        (checkpoint_folder / lacks).unlink()
    with pytest.raises(SvlError, match="has a PEFT adapter"):
        checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")


def test_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(SvlError, match=r"has no config\.json"):
        checkpoint_fingerprint(str(tmp_path), None, tmp_path)


@pytest.mark.parametrize("path", ["/no/such", "./no/such", "~/no/such", "nosuch", "a/b/c", "a b/c d"])
def test_what_is_neither_folder_nor_hub_id(path, tmp_path):
    with pytest.raises(SvlError, match=r"model\.path: ") as caught:
        checkpoint_fingerprint(path, None, tmp_path)
    assert path in str(caught.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers with a commit (or raises), over an empty local cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def answer(result, *files):
        siblings = [SimpleNamespace(rfilename=name, size=9) for name in files] or None

        def model_info(self, repo, revision=None, files_metadata=False):
            if isinstance(result, Exception):
                raise result
            commit = f"{result}-of-{revision or 'main'}"
            return SimpleNamespace(sha=commit, siblings=siblings, gated=False, card_data=None)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    return answer


def connection_error() -> Exception:
    """What the HTTP client under huggingface_hub raises without a network."""
    client = sys.modules[HTTPError.__module__.partition(".")[0]]
    return client.ConnectError("Name or service not known")


def test_hub_id_is_pinned_to_its_commit(hub, tmp_path):
    hub("c0ffee")
    assert checkpoint_fingerprint("owner/name", None, tmp_path) == "owner/name@c0ffee-of-main"
    assert checkpoint_fingerprint("owner/name", "v1", tmp_path) == "owner/name@c0ffee-of-v1"


def test_adapters_on_the_hub_are_refused(hub, tmp_path):
    hub("c0ffee", "config.json", "model.safetensors")
    assert checkpoint_fingerprint("owner/name", None, tmp_path) == "owner/name@c0ffee-of-main"
    hub("c0ffee", "config.json", "adapter_config.json", "model.safetensors")
    with pytest.raises(SvlError, match="'owner/name' has a PEFT adapter"):
        checkpoint_fingerprint("owner/name", None, tmp_path)


def test_hashes_are_not_remembered_in_a_folder_that_may_only_be_read(checkpoint_folder, tmp_path, hashed):
    first = checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache")
    (tmp_path / "file").touch()
    assert checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "file" / "cache") == first


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), connection_error(), TimeoutError()])
def test_hub_id_without_network_is_what_the_cache_has(hub, tmp_path, error):
    hub(error)
    with pytest.raises(SvlError, match=r"'owner/name' is no local folder, and the hub does not answer for it"):
        checkpoint_fingerprint("owner/name", None, tmp_path)
    repo = tmp_path / "hub" / "models--owner--name"
    for place, text in (("refs/main", "abc123"), ("snapshots/abc123/config.json", "{}")):
        (repo / place).parent.mkdir(parents=True)
        (repo / place).write_text(text)
    assert checkpoint_fingerprint("owner/name", None, tmp_path) == "owner/name@abc123"
    with pytest.raises(SvlError, match="hub does not answer"):
        checkpoint_fingerprint("owner/name", "v1", tmp_path)


def test_unknown_hub_id(hub, tmp_path):
    response = SimpleNamespace(status_code=404, headers={}, request=None)
    hub(RepositoryNotFoundError("404 Client Error", response=response))
    with pytest.raises(SvlError, match=r"'owner/nmae' .*RepositoryNotFoundError"):
        checkpoint_fingerprint("owner/nmae", None, tmp_path)
