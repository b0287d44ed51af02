"""Files of ours in whose place something else was put: named as damage at once, never waited for or read for ever."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from storage_faults import commit_content

from shoal.errors import CorruptError
from shoal.storage import MANIFEST, FileLock, journal, newest_verified, read_json, read_lines, verify


def a_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(b"{}\n")
    path.symlink_to(target)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_PATH)  # a socket's path has 107 bytes at most, and pytest's are long
        server.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def a_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("only root makes devices")


KINDS = pytest.mark.parametrize("make", [a_link, Path.mkdir, a_pipe, a_socket, a_device])


@KINDS
@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", [read_json, read_lines])
def test_what_is_no_plain_file_is_damage(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    make(path := tmp_path / "file")
    with pytest.raises(CorruptError, match=r"file is no plain file but a .*move it away"):
        read(path)


@KINDS
@pytest.mark.timeout(20)
def test_a_manifest_that_is_none_falls_back(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for step in (1, 2):
        commit_content(tmp_path / f"step-{step:010}")
    manifest = tmp_path / "step-0000000002" / MANIFEST
    manifest.unlink()
    make(manifest)
    with pytest.raises(CorruptError, match=f"{MANIFEST} is no plain file"):
        verify(manifest.parent)
    rejected: list[str] = []
    found = newest_verified(tmp_path, on_rejected=lambda path, reason: rejected.append(path.name))
    assert found is not None
    assert (found[0].name, rejected) == ("step-0000000001", ["step-0000000002"])


def test_what_is_not_named_like_one_is_not_even_refused(tmp_path: Path) -> None:
    commit_content(tmp_path / "step-1")
    commit_content(tmp_path / "step-1.bak")
    found = newest_verified(
        tmp_path, named=lambda name: name == "step-1", on_rejected=lambda path, reason: pytest.fail(reason)
    )
    assert found is not None
    assert found[0].name == "step-1"


@KINDS
@pytest.mark.timeout(20)
def test_a_lock_is_looked_at_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "lock")
    assert FileLock(tmp_path / "lock").owner() is None


@pytest.mark.timeout(20)
def test_a_pipe_is_no_lock_that_somebody_holds(tmp_path: Path) -> None:
    a_pipe(tmp_path / "lock")
    assert not FileLock(tmp_path / "lock").is_held()


def test_absurdly_many_lines_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_LINES_BYTES", 100)
    (tmp_path / "lines").write_bytes(b"a line\n" * 20)
    with pytest.raises(CorruptError, match="lines has more than 100 bytes"):
        read_lines(tmp_path / "lines")
