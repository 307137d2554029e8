"""One holder at a time, on file systems with locks and without; whoever waits learns for whom."""

import errno
import os
import re
import socket
import threading
from multiprocessing.connection import Connection

import pytest
from helpers.races import another_process

from svl.core import SvlError
from svl.store import locks
from svl.store.files import whole_folder
from svl.store.locks import Lock, held


@pytest.fixture(params=["kernel", "ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def holder(request, tmp_path, monkeypatch):
    """Another process that holds the lock `tmp_path/lock`, where the kernel has locks or says why not; ends if told."""
    if request.param != "kernel":
        number = getattr(errno, request.param)

        def missing(_: int) -> bool:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", missing)

    def hold(told: Connection) -> None:
        lock = Lock(tmp_path / "lock")
        told.send(lock.acquire())
        told.recv()
        lock.release()

    with another_process(hold) as (process, told):
        assert told.recv()
        yield process, told


def test_only_one_process_holds_a_lock(holder, tmp_path):
    lock = Lock(tmp_path / "lock")
    assert not lock.acquire()
    said = re.fullmatch(r"process (\d+) on (.+) since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", lock.holder())
    assert (int(said[1]), said[2]) == (holder[0].pid, socket.gethostname())


def test_who_waits_is_told_for_whom_and_goes_on(holder, tmp_path):
    told = []

    def tell(who: str) -> None:
        told.append(who)
        holder[1].send("end")

    lock = Lock(tmp_path / "lock")
    assert lock.acquire(on_wait=tell)
    assert len(told) == 1
    assert f"process {holder[0].pid}" in told[0]
    assert f"process {os.getpid()}" in lock.holder()
    lock.release()


def test_locks_of_killed_processes_are_free(holder, tmp_path):
    holder[0].kill()
    holder[0].join()
    lock = Lock(tmp_path / "lock")
    assert lock.acquire(on_wait=lambda _: None)
    lock.release()


def test_markers_of_hosts_that_are_gone_become_free(tmp_path, monkeypatch):
    """Without locks of the kernel, a holder that no longer renews its marker counts as gone after a stated time."""
    monkeypatch.setattr(locks, "STALE", 1.5)

    def missing(_: int) -> bool:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", missing)
    first = Lock(tmp_path / "lock")
    assert first.acquire()
    marker = tmp_path / "lock.marker"
    text = marker.read_text().replace(socket.gethostname(), "another-host")
    first.release()
    assert not marker.exists()
    marker.write_text(text)
    second = Lock(tmp_path / "lock")
    assert not second.acquire()  # it may be alive
    assert second.acquire(on_wait=lambda _: None)
    second.release()


def test_markers_that_were_abandoned_long_ago_are_free_at_once(tmp_path, monkeypatch):
    """As cleaning asks, which does not wait: of a dead process of another host, whose number may be alive on this."""

    def missing(_: int) -> bool:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", missing)
    first = Lock(tmp_path / "lock")
    assert first.acquire()
    marker = tmp_path / "lock.marker"
    text = marker.read_text().replace(socket.gethostname(), "another-host")
    first.release()
    for age, free in ((locks.ABANDONED / 2, False), (locks.ABANDONED + 60, True)):
        marker.write_text(text)
        then = marker.stat().st_mtime - age
        os.utime(marker, (then, then))
        assert locks.is_free(tmp_path / "lock") == free
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_renewed_markers_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 0.6)

    def missing(_: int) -> bool:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", missing)
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    free = threading.Event()
    waiting = threading.Thread(target=lambda: second.acquire(on_wait=lambda _: None) and free.set())
    waiting.start()
    assert not free.wait(2.5)  # four times as long as a marker lasts
    first.release()
    assert free.wait(10)
    waiting.join()
    second.release()


def test_paths_are_held_by_one_thread_that_may_take_them_again(tmp_path):
    path = tmp_path / "new" / "out"
    refused = []

    def try_it() -> None:
        try:
            with held(path):
                pass
        except SvlError as error:
            refused.append(str(error))

    with held(path), held(path):
        other = threading.Thread(target=try_it)
        other.start()
        other.join()
    (message,) = refused
    assert re.search(rf"out' is being written by process {os.getpid()} on .* since ", message)
    assert not path.parent.exists()  # made for the lock, and empty
    try_it()
    assert len(refused) == 1


def test_a_path_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SvlError, match=r"cannot write .*File exists"), held(tmp_path / "file" / "out"):
        pass
    with pytest.raises(SvlError, match=r"cannot write .*File name too long"), held(tmp_path / ("x" * 254)):
        pass


# --------------------------------------------------------------------------------------------- whole folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail() -> None:
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "file").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]
    with pytest.raises(SvlError, match="exists already; it is never overwritten"), whole_folder(tmp_path / "out"):
        pytest.fail("entered")


def test_scratch_of_killed_processes_goes_and_nothing_else(tmp_path):
    old, mine = tmp_path / f".out.host-1-{'a' * 16}.incomplete", tmp_path / ".out.json.incomplete"
    other = tmp_path / f".out.json.host-1-{'a' * 16}.incomplete"  # of another target
    for folder in (old, mine, other):
        folder.mkdir()
    with whole_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", mine.name, other.name}


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def write() -> None:
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / "ours").touch()
            (tmp_path / "out").mkdir()  # empty: renaming onto it would work

    with pytest.raises(SvlError, match="made by somebody else"):
        write()
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
