"""The store: whole artifacts or none, computed once, found again by what they depend on."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors import SafetensorError

from svl import store as module
from svl.core import SvlError
from svl.store import Store, checkpoint_fingerprint, digest

# Makes one artifact in a process of its own: a file in two halves with a pause between, each build noted in a log.
WRITER = """
import sys, time
from pathlib import Path
from svl.store import Store

root, log, pause = sys.argv[1:]
def build(folder):
    with open(log, "a") as file:
        file.write("built\\n")
    (folder / "data").write_text("first half, ")
    time.sleep(float(pause))
    with open(folder / "data", "a") as file:
        file.write("second half")
    return {"answer": 42}
entry = Store(root).make("plan", {"x": 1}, build)
print(entry.reused, entry.output["answer"], (entry.path / "data").read_text())
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def writer(tmp_path):
    """Start a process that makes the artifact of `WRITER`, with a pause in the middle of its build."""
    started = []

    def start(pause: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(tmp_path / "store"), str(tmp_path / "log"), str(pause)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def files(root: Path) -> list[str]:
    """Everything in the store but locks."""
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(name for name in found if not name.startswith("lock/"))


def two_files(folder: Path) -> dict[str, object]:
    (folder / "numbers").write_bytes(bytes(range(100)))
    (folder / "sub").mkdir()
    (folder / "sub" / "text").write_text("text")
    return {"score": 0.5, "removed": (1, 2)}


def no_build(folder: Path) -> None:
    pytest.fail("computed again")


def test_made_once_and_found_again(store):
    made = store.make("plan", {"x": 1}, two_files)
    again = Store(store.root).make("plan", {"x": 1}, no_build)
    assert (made.reused, again.reused) == (False, True)
    assert made.path == again.path == store.root / "plan" / made.key
    assert made.manifest == again.manifest  # the maker gets what any reader gets: lists, not tuples
    assert made.output == {"score": 0.5, "removed": [1, 2]}
    assert set(made.manifest["files"]) == {"numbers", "sub/text"}
    assert files(store.root) == [f"plan/{made.key}/{name}" for name in ("manifest.json", "numbers", "sub/text")]


def test_finished_artifacts_need_no_lock(store, monkeypatch):
    """They can be read from a store that belongs to somebody else."""
    made = store.make("plan", {"x": 1}, two_files)
    monkeypatch.setattr(module, "FileLock", lambda *_: pytest.fail("locked"))
    assert store.make("plan", {"x": 1}, no_build).manifest == made.manifest


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SvlError("bad input")])
def test_build_that_raises_leaves_nothing(store, error):
    def build(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.make("plan", {"x": 1}, build)
    assert files(store.root) == []
    assert not list((store.root / "tmp").iterdir())
    assert not store.make("plan", {"x": 1}, two_files).reused


def test_killed_writer_is_swept_by_the_next(store, writer, tmp_path):
    victim = writer(60)
    deadline = time.monotonic() + 60
    while not list(store.root.glob("tmp/*/data")):
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert [name.split("/")[0] for name in files(store.root)] == ["tmp"]

    assert writer(0).communicate(timeout=60)[0] == "False 42 first half, second half\n"
    assert not list((store.root / "tmp").iterdir())
    assert writer(0).communicate(timeout=60)[0] == "True 42 first half, second half\n"


def test_two_processes_compute_once(writer, tmp_path):
    outputs = [process.communicate(timeout=60)[0] for process in (writer(1), writer(1))]
    assert sorted(outputs) == [f"{reused} 42 first half, second half\n" for reused in (False, True)]
    assert (tmp_path / "log").read_text() == "built\n"


def truncate(entry):
    os.truncate(entry.path / "numbers", 99)


def flip_a_byte(entry):
    (entry.path / "numbers").write_bytes(bytes([1, *range(1, 100)]))


def delete_a_file(entry):
    (entry.path / "sub" / "text").unlink()


def break_the_manifest(entry):
    os.truncate(entry.path / "manifest.json", 50)


def change_a_result(entry):
    manifest = entry.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"score": 0.5', '"score": 0.7'))


def forget_a_key(entry):
    (entry.path / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "numbers"),
        (flip_a_byte, "numbers"),
        (delete_a_file, "sub/text"),
        (break_the_manifest, "manifest.json"),
        (change_a_result, "manifest.json"),
        (forget_a_key, "manifest.json"),
    ],
)
def test_damaged_artifact_is_named_and_computed_again(store, caplog, damage, named):
    entry = store.make("plan", {"x": 1}, two_files)
    damage(entry)
    again = store.make("plan", {"x": 1}, two_files)
    assert not again.reused
    assert again.output == entry.output
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"{entry.path} is damaged ({named})" in warning.message
    assert store.make("plan", {"x": 1}, no_build).reused


def test_artifact_without_manifest_is_computed_again(store):
    (store.make("plan", {"x": 1}, two_files).path / "manifest.json").unlink()  # e.g. killed while deleting it
    assert not store.make("plan", {"x": 1}, two_files).reused


def test_entries_are_the_finished_ones(store, caplog):
    whole, damaged = (store.make("run", {"x": x}, two_files) for x in (1, 2))
    truncate(damaged)
    assert [entry.key for entry in store.entries("run")] == [whole.key]
    assert damaged.path.exists()  # reading deletes nothing
    assert str(damaged.path) in caplog.text
    assert list(store.entries("plan")) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_one_clear_error(store, error):
    finished = store.make("stats", {"x": 1}, two_files)

    def build(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(SvlError, match=r"cannot write stage 'plan' to the store .*(space|quota).*run again") as caught:
        store.make("plan", {"x": 1}, build)
    assert "\n" not in str(caught.value)
    assert not list((store.root / "tmp").iterdir())
    assert store.make("stats", {"x": 1}, no_build).key == finished.key
    assert not store.make("plan", {"x": 1}, two_files).reused


def test_too_little_space_stops_a_stage_before_it_starts(store, monkeypatch):
    finished = store.make("stats", {"x": 1}, two_files)
    monkeypatch.setattr(module, "MINIMUM_FREE", 2**62)
    with pytest.raises(SvlError, match="No space left on device"):
        store.make("plan", {"x": 1}, no_build)
    assert store.make("stats", {"x": 1}, no_build).key == finished.key


def test_store_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SvlError, match=r"cannot write stage 'plan' .*Not a directory"):
        Store(tmp_path / "file" / "store").make("plan", {}, no_build)


def test_error_of_a_build_that_is_no_full_disk_is_kept(store):
    def build(folder):
        (folder / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        store.make("plan", {}, build)


def test_digest_is_of_canonical_json():
    assert digest({"b": (1, 2.5), "a": None}) == digest({"a": None, "b": [1, 2.5]})
    assert digest({"b": 1, "a": "x"}) == hashlib.sha256(b'{"a":"x","b":1}').hexdigest()[:16]
    assert len({digest(v) for v in ({"a": 1}, {"a": "1"}, {"a": [1]}, {"a": None}, {"b": 1}, {})}) == 6
    with pytest.raises(TypeError):
        digest({"path": Path("x")})  # what JSON cannot hold is no key


def test_key_depends_on_stage_schema_and_inputs_only(tmp_path, monkeypatch):
    def key(number, stage="plan", **inputs):
        return Store(tmp_path / str(number)).make(stage, inputs, lambda _: {"output": number}).key

    first = key(1, x=1, y=[2])
    assert key(2, y=(2,), x=1) == first
    assert len({first, key(3, x=2, y=[2]), key(4, x=1), key(5, "stats", x=1, y=[2])}) == 4
    monkeypatch.setitem(module.SCHEMA, "plan", module.SCHEMA["plan"] + 1)
    assert key(6, x=1, y=[2]) != first


def test_file_that_stays_as_it_is_is_read_once(tmp_path, monkeypatch):
    file, reads = tmp_path / "file", []
    read = module.remembered(lambda path: reads.append(path) or path.read_text())
    file.write_text("first")
    assert [read(file), read(file), len(reads)] == ["first", "first", 2]  # too young: its times might hide a change
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert [read(file), read(file), len(reads)] == ["first", "first", 3]
    before = file.stat()
    time.sleep(0.05)
    file.write_text("other")  # of the same size, at the same time of modification
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [read(file), len(reads)] == ["other", 4]
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read(file)


# ------------------------------------------------------------------------------------- checkpoint fingerprint


@pytest.fixture
def checkpoint_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/extra.json", "README.md"):
        (folder / name).write_text(f"content of {name}")
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
    for name, text in (
        ("model.safetensors", "CONTENT of model.safetensors"),  # of the same size
        ("sub/extra.json", ""),
        ("new.json", ""),
    ):
        (checkpoint_folder / name).write_text(text)
        seen.add(fingerprint(checkpoint_folder))
    (checkpoint_folder / "new.json").rename(checkpoint_folder / "newer.json")
    seen.add(fingerprint(checkpoint_folder))
    assert len(seen) == 5


def test_large_files_are_hashed_once(checkpoint_folder, tmp_path, monkeypatch):
    large = checkpoint_folder / "model.safetensors"
    os.truncate(large, 64 * 2**20)
    hashed = []
    real = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda path: hashed.append(path) or real(path))

    def fingerprint():
        hashed.clear()
        return checkpoint_fingerprint(str(checkpoint_folder), None, tmp_path / "cache"), large in hashed

    first, _ = fingerprint()
    assert fingerprint() == (first, False)
    with open(large, "r+") as file:
        file.write("C")
    assert fingerprint()[0] != first


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

    def answer(result):
        def model_info(self, repo, revision=None):
            if isinstance(result, Exception):
                raise result
            return SimpleNamespace(sha=f"{result}-of-{revision or 'main'}")

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
    response = SimpleNamespace(headers={}, request=None)
    hub(RepositoryNotFoundError("404 Client Error", response=response))
    with pytest.raises(SvlError, match=r"'owner/nmae' .*RepositoryNotFoundError"):
        checkpoint_fingerprint("owner/nmae", None, tmp_path)


def test_manifest_is_readable(store):
    manifest = json.loads((store.make("plan", {"x": 1}, two_files).path / "manifest.json").read_text())
    assert manifest["inputs"] == {"x": 1}
    assert manifest["stage"] == "plan"
    assert manifest["seconds"] >= 0
