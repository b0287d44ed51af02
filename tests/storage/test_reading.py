"""What is being read is not deleted, and what is being deleted is not begun to be read."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from storage_faults import SteppedDisk, start_child, wait_child

from shoal.errors import CorruptError
from shoal.storage import MANIFEST, discard_unread, reading, verify


def test_it_stays_while_anybody_reads(committed: Path) -> None:
    with reading(committed):
        with reading(committed):
            assert not discard_unread(committed)
        assert not discard_unread(committed)
        verify(committed)
    assert discard_unread(committed)
    assert os.listdir(committed.parent) == []
    assert discard_unread(committed), "again: fine"


def read_for_ever(committed: Path, ready: int) -> None:
    with reading(committed):
        os.write(ready, b"x")
        signal.pause()


def test_a_reader_that_was_killed_protects_nothing(committed: Path) -> None:
    hear, ready = os.pipe()
    pid = start_child(partial(read_for_ever, committed, ready))
    assert os.read(hear, 1)
    assert not discard_unread(committed)
    os.kill(pid, signal.SIGKILL)
    assert wait_child(pid) == -signal.SIGKILL
    assert discard_unread(committed)
    os.close(hear)
    os.close(ready)


def test_who_comes_while_it_is_deleted_is_told(committed: Path) -> None:
    def come(number: int, name: str) -> None:
        with pytest.raises(CorruptError, match="was deleted"), reading(committed):
            pass

    assert discard_unread(committed, disk=SteppedDisk(come))


def test_who_was_about_to_read_what_was_exchanged_is_told(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened the manifest; before it locks it, all is deleted and another stands in its place."""
    room = sys.modules["shoal.storage.reading"]  # its function has that name, too
    copy = shutil.copytree(committed, committed.with_name("copy"))
    lock = room._lock

    def late(file: object, kind: int) -> bool:
        monkeypatch.setattr(room, "_lock", lock)
        discard_unread(committed)
        copy.rename(committed)
        return bool(lock(file, kind))

    monkeypatch.setattr(room, "_lock", late)
    with pytest.raises(CorruptError, match="was deleted"), reading(committed):
        pass


def test_what_has_no_manifest_is_read_by_nobody(committed: Path) -> None:
    (committed / MANIFEST).unlink()
    with pytest.raises(CorruptError, match="never committed"), reading(committed):
        pass
    assert discard_unread(committed)
    assert not committed.exists()
