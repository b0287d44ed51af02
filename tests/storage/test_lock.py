"""One holder at a time, and none once it is dead."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from storage_faults import start_child, wait_child

from shoal.errors import DeadlineExceeded
from shoal.storage import FileLock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    first, second = FileLock(path), FileLock(path)
    assert not second.is_held()
    assert second.owner() is None
    with first:
        first.acquire()  # again: fine
        assert second.is_held()
        assert first.is_held()
        with pytest.raises(DeadlineExceeded, match=f"process {os.getpid()} on"):
            second.acquire(timeout_s=0.01)
        owner = second.owner()
        assert owner is not None
        assert owner["pid"] == os.getpid()
    assert not first.is_held()
    second.acquire()
    second.release()
    second.release()  # again: fine
    assert path.stat().st_mode & 0o777 == 0o600


def hold(path: Path, ready: int) -> None:
    lock = FileLock(path)
    lock.acquire()
    os.write(ready, b"1")
    signal.pause()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pid = start_child(lambda: hold(tmp_path / "lock", writer))
    os.read(reader, 1)
    lock = FileLock(tmp_path / "lock")
    with pytest.raises(DeadlineExceeded, match=f"process {pid} on"):
        lock.acquire()
    os.kill(pid, signal.SIGKILL)
    lock.acquire(timeout_s=60)
    lock.release()
    wait_child(pid)


def test_a_child_forked_by_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Loader processes are forked from the trainer; they outlive a killed parent for seconds."""
    reader, writer = os.pipe()
    end, orphan_end = os.pipe()

    def hold_and_fork() -> None:
        lock = FileLock(tmp_path / "lock")
        lock.acquire()
        start_child(lambda: os.read(end, 1))  # goes on after our death
        os.write(writer, b"1")
        signal.pause()

    pid = start_child(hold_and_fork)
    os.read(reader, 1)
    os.kill(pid, signal.SIGKILL)
    wait_child(pid)
    try:
        with FileLock(tmp_path / "lock", timeout_s=1) as lock:
            assert lock.is_held()
    finally:
        os.write(orphan_end, b"1")


def test_those_who_look_do_not_see_each_other_nor_keep_anybody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    path.touch()
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)  # as `is_held` does for a moment
    lock = FileLock(path)
    assert not lock.is_held()
    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(looking))  # the moment is over while we wait
    lock.acquire()
    assert lock.is_held()
    lock.release()


def test_a_full_disk_does_not_deny_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with FileLock(tmp_path / "lock"):
        assert FileLock(tmp_path / "lock").is_held()
        with pytest.raises(DeadlineExceeded, match="another process"):
            FileLock(tmp_path / "lock").acquire()
