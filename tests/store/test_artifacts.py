"""The store: whole artifacts or none, computed once, found again by what they depend on."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from helpers.races import another_process, race
from safetensors import SafetensorError

from svl.core import SvlError
from svl.store import artifacts, files
from svl.store.artifacts import Store
from svl.store.files import digest
from svl.store.in_use import end_lease
from svl.store.locks import Lock


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def listed(root: Path) -> list[str]:
    """Everything in the store but its marker, locks and leases."""
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(name for name in found if not name.startswith(("lock/", "in-use/", "svl-store.json")))


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
    assert listed(store.root) == [f"plan/{made.key}/{name}" for name in ("manifest.json", "numbers", "sub/text")]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_finished_artifacts_can_be_read_from_a_store_that_cannot_be_written(store, monkeypatch, code):
    made = store.make("plan", {"x": 1}, two_files)
    end_lease(store.root)

    def refused(*_: object) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Lock, "acquire", refused)
    assert store.make("plan", {"x": 1}, no_build).manifest == made.manifest
    assert store.get("plan", {"x": 1}).manifest == made.manifest


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SvlError("bad input")])
def test_build_that_raises_leaves_nothing(store, error):
    def build(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.make("plan", {"x": 1}, build)
    assert listed(store.root) == []
    assert not list((store.root / "tmp").iterdir())
    assert not store.make("plan", {"x": 1}, two_files).reused


def test_killed_writer_is_swept_by_the_next(store):
    def make(told: Connection) -> None:
        def build(folder: Path) -> dict[str, object]:
            (folder / "data").write_text("first half, ")
            told.send("half")
            told.recv()
            return {}

        Store(store.root).make("plan", {"x": 1}, build)

    with another_process(make) as (victim, told):
        assert told.recv() == "half"
        victim.kill()
        victim.join()
    assert [name.split("/")[0] for name in listed(store.root)] == ["tmp"]

    made = store.make("plan", {"x": 1}, two_files)
    assert (made.reused, made.output["score"]) == (False, 0.5)
    assert not list((store.root / "tmp").iterdir())
    assert store.make("plan", {"x": 1}, no_build).manifest == made.manifest


def test_two_processes_compute_once(store):
    """In 20 rounds, both want the same artifact: one computes it, the other gets that."""

    def make(number: int, process: int) -> tuple[bool, int]:
        def build(folder: Path) -> dict[str, int]:
            (folder / "data").write_text("first half, ")
            time.sleep(0.02)
            with open(folder / "data", "a") as file:
                file.write("second half")
            return {"process": process}

        entry = Store(store.root).make("plan", {"x": number}, build)
        assert (entry.path / "data").read_text() == "first half, second half"
        return entry.reused, entry.output["process"]

    for first, second in race(make):
        assert {first[0], second[0]} == {False, True}  # one has computed it
        assert first[1] == second[1]
    assert not list((store.root / "tmp").iterdir())


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


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(store):
    """Each bit in turn: what is read is what was written, or nothing."""
    entry = store.make("plan", {"x": 1}, lambda folder: {"score": 0.5})
    file = entry.path / "manifest.json"
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        again = store.read(entry.path, warn=False)
        assert again is None or again.manifest == entry.manifest, bytes(flipped)


def changed(entry, **fields):
    """Rewrite a manifest with other fields, sealed as version 0.1.0 did."""
    manifest = {**json.loads((entry.path / "manifest.json").read_text()), **fields}
    manifest["digest"] = digest([manifest[name] for name in ("inputs", "output", "files")])
    (entry.path / "manifest.json").write_text(json.dumps(manifest))


def test_manifests_of_version_0_1_0_are_read(store):
    entry = store.make("plan", {"x": 1}, two_files)
    changed(entry, created="2025-01-01T00:00:00+0000")
    assert store.make("plan", {"x": 1}, no_build).manifest["created"] == "2025-01-01T00:00:00+0000"


@pytest.mark.parametrize(
    "fields",
    [
        {"created": 3}, {"created": "yesterday"}, {"created": None}, {"versions": []}, {"seconds": "long"},
        {"stage": "patch"}, {"key": "0" * 16}, {"files": {"../../secret": [1, "x"]}}, {"output": []},
    ],
)  # fmt: skip
def test_one_odd_manifest_hides_no_other(store, fields, caplog):
    odd, whole = (store.make("run", {"x": x}, two_files) for x in (1, 2))
    changed(odd, **fields)
    assert [entry.key for entry in store.entries("run")] == [whole.key]
    assert f"{odd.path} is damaged (manifest.json)" in caplog.text


def test_artifact_copied_to_another_key_counts_as_missing(store):
    entry = store.make("plan", {"x": 1}, two_files)
    other = entry.path.with_name("0123456789abcdef")
    entry.path.rename(other)
    assert store.read(other, warn=False) is None


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
    monkeypatch.setattr(artifacts, "MINIMUM_FREE", 2**62)
    with pytest.raises(SvlError, match="No space left on device"):
        store.make("plan", {"x": 1}, no_build)
    assert store.make("stats", {"x": 1}, no_build).key == finished.key


def test_store_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SvlError, match=r"cannot write stage 'plan' .*Not a directory"):
        Store(tmp_path / "file" / "store").make("plan", {}, no_build)


CODES = (
    "ENOLCK",
    "EOPNOTSUPP",
    "ESTALE",
    "EXDEV",
    "ENAMETOOLONG",
    "EDQUOT",
    "ENOSPC",
    "EROFS",
    "EIO",
    "EMFILE",
    "EPERM",
)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["os.replace", "pathlib.Path.mkdir", "shutil.disk_usage", "filelock._unix.os.open"])
def test_any_error_of_the_file_system_is_one_line(store, monkeypatch, call, code):
    finished = store.make("stats", {"x": 1}, two_files)
    number = getattr(errno, code)

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(call, refused)
        with pytest.raises(SvlError, match=re.escape(os.strerror(number))) as caught:
            store.make("plan", {"x": 1}, two_files)
    assert "\n" not in str(caught.value)
    assert not [name for name in listed(store.root) if not name.startswith("stats/")]
    assert store.make("stats", {"x": 1}, no_build).key == finished.key
    assert not store.make("plan", {"x": 1}, two_files).reused


def test_artifact_that_cannot_be_read_is_one_line(store, monkeypatch):
    entry = store.make("plan", {"x": 1}, two_files)

    def refused(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "manifest.json")

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(SvlError, match=r"cannot read .*Input/output error"):
        store.read(entry.path)


@pytest.mark.parametrize("root", ["", "  "])
def test_empty_path_is_no_store(root):
    with pytest.raises(SvlError, match=r"path of the store is empty.*paths\.store"):
        Store(root)


def test_scratch_is_there_for_a_block_only(store):
    with store.scratch("served") as first, store.scratch("served") as second:
        assert first != second
        assert first.parent == store.root / "tmp"
    assert not list((store.root / "in-use").iterdir())


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
    monkeypatch.setitem(artifacts.SCHEMA, "plan", artifacts.SCHEMA["plan"] + 1)
    assert key(6, x=1, y=[2]) != first


def test_file_that_stays_as_it_is_is_read_once(tmp_path, monkeypatch):
    file, reads = tmp_path / "file", []
    read = files.remembered(lambda path: reads.append(path) or path.read_text())
    file.write_text("first")
    assert [read(file), read(file), len(reads)] == ["first", "first", 2]  # too young: its times might hide a change
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert [read(file), read(file), len(reads)] == ["first", "first", 3]
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the clock has ticked
        file.write_text("other")  # of the same size, at the same time of modification
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [read(file), len(reads)] == ["other", 4]
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read(file)


def test_manifest_is_readable(store):
    manifest = json.loads((store.make("plan", {"x": 1}, two_files).path / "manifest.json").read_text())
    assert manifest["inputs"] == {"x": 1}
    assert manifest["stage"] == "plan"
    assert manifest["seconds"] >= 0
