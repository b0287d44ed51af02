"""Reading: nothing that differs from what was committed in a single byte is used."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storage_faults import CONTENT, commit_content, in_child

from shoal.errors import CorruptError, StorageError
from shoal.storage import MANIFEST, newest_verified, verify

# By name: `shoal.storage.commit`, the attribute, is the function.
protocol = importlib.import_module("shoal.storage.commit")

FILES = [*CONTENT, MANIFEST]


def assert_corrupt(directory: Path, match: str | None = None) -> None:
    with pytest.raises(CorruptError, match=match) as raised:
        verify(directory)
    assert str(directory) in str(raised.value)


def forge(directory: Path, **changes: Any) -> None:
    """Write a manifest with a correct digest, as somebody who means harm would."""
    body = {"format": 1, "files": {}, "meta": {}, **changes}
    (directory / MANIFEST).write_bytes(protocol._render(body))


def entry(content: bytes) -> dict[str, Any]:
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_seen(committed: Path, name: str) -> None:
    content = (committed / name).read_bytes()
    file = os.open(committed / name, os.O_WRONLY)  # changed in place, which is much faster than made anew
    for position, byte in enumerate(content):
        for bit in range(8):
            os.pwrite(file, bytes([byte ^ 1 << bit]), position)
            with pytest.raises(CorruptError):
                verify(committed)
        os.pwrite(file, bytes([byte]), position)
    os.close(file)
    verify(committed)


def test_every_exchanged_byte_of_the_manifest_is_seen(committed: Path) -> None:
    """Also those that mean the same to a JSON parser, or that look like another valid manifest."""
    content = (committed / MANIFEST).read_bytes()
    for position, old in enumerate(content):
        for new in b' \n\t\r,:{}"0123456789abcdefABCDEF-.':
            if new != old:
                with pytest.raises(CorruptError):
                    protocol.parse_manifest(
                        content[:position] + bytes([new]) + content[position + 1 :], committed
                    )
    for position in range(len(content) + 1):
        for added in b' \n"0':
            with pytest.raises(CorruptError):
                protocol.parse_manifest(content[:position] + bytes([added]) + content[position:], committed)


@pytest.mark.parametrize("name", FILES)
def test_every_other_length_is_seen(committed: Path, name: str) -> None:
    content = (committed / name).read_bytes()
    for length in reversed(range(len(content))):
        os.truncate(committed / name, length)
        assert_corrupt(committed, None if name == MANIFEST else f"{length} bytes instead of {len(content)}")
    for more in (b"\0", b"\n", b" ", content[:1] or b"x"):
        (committed / name).write_bytes(content + more)
        assert_corrupt(committed)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_seen(committed: Path, name: str) -> None:
    (committed / name).unlink()
    assert_corrupt(committed, "never committed" if name == MANIFEST else f"missing: {name}")


def test_an_added_file_is_seen(committed: Path) -> None:
    (committed / "parts" / "rank-2").touch()
    assert_corrupt(committed, "parts/rank-2")


def test_two_exchanged_files_are_seen(committed: Path) -> None:
    os.rename(committed / "weights.bin", committed / "spare")
    os.rename(committed / "state.json", committed / "weights.bin")
    os.rename(committed / "spare", committed / "state.json")
    assert_corrupt(committed)


def test_no_directory_is_never_a_committed_one(tmp_path: Path) -> None:
    assert_corrupt(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert_corrupt(tmp_path / "empty", "never committed")
    (tmp_path / "file").touch()
    assert_corrupt(tmp_path / "file", "not a directory")


def _link_the_file(directory: Path) -> None:
    os.rename(directory / "weights.bin", directory.parent / "weights.bin")
    (directory / "weights.bin").symlink_to(directory.parent / "weights.bin")


def _link_the_folder(directory: Path) -> None:
    os.rename(directory / "parts", directory.parent / "parts")
    (directory / "parts").symlink_to(directory.parent / "parts")


def _link_the_manifest(directory: Path) -> None:
    os.rename(directory / MANIFEST, directory.parent / MANIFEST)
    (directory / MANIFEST).symlink_to(directory.parent / MANIFEST)


def _put_a_pipe(directory: Path) -> None:
    (directory / "weights.bin").unlink()
    os.mkfifo(directory / "weights.bin")


def _put_a_pipe_as_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    os.mkfifo(directory / MANIFEST)


@pytest.mark.parametrize(
    "change", [_link_the_file, _link_the_folder, _link_the_manifest, _put_a_pipe, _put_a_pipe_as_manifest]
)
def test_links_and_special_files_are_refused_even_with_the_right_content(
    committed: Path, change: Callable[[Path], None]
) -> None:
    change(committed)
    assert_corrupt(committed)


def test_a_link_to_a_committed_directory_is_refused(committed: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(committed)
    assert_corrupt(tmp_path / "link", "not a directory")


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/hostname", "a/../../secret", "./a", "a//b", "", ".", "..", "a/", "a\0b", MANIFEST],
)
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    forge(directory, files={path: entry(b"s")})
    assert_corrupt(directory, "not a plain path")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"a": {"size_bytes": 1}}},
        {"files": {"a": {"size_bytes": "1", "sha256": "0" * 64}}},
        {"files": {"a": {"size_bytes": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"size_bytes": 1, "sha256": "../../../"}}},
        {"files": {"a": {"size_bytes": 1, "sha256": "0" * 64, "more": 1}}},
        {"files": {"a": None}},
        {"files": []},
        {"meta": []},
        {"format": 2},
        {"format": None},
    ],
)
def test_a_malformed_manifest_with_a_right_digest_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    forge(tmp_path, **changes)
    assert_corrupt(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"1" * 5000, b"null", b"{}", b"\xff", b'{"files": {}, "files": {}}']
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    assert_corrupt(tmp_path, "not as it was written")


def test_a_huge_manifest_is_not_read(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_MANIFEST_BYTES", 100)
    assert_corrupt(committed, "more than 100 bytes")


def test_the_newest_that_verifies_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        commit_content(tmp_path / f"step-{step:010}")
    (tmp_path / "step-0000000010" / "weights.bin").write_bytes(b"")
    (tmp_path / "step-0000000003" / MANIFEST).unlink()
    (tmp_path / ".step-0000000011.half").mkdir()
    (tmp_path / "zzz").touch()
    rejected: list[tuple[str, str]] = []
    found = newest_verified(tmp_path, on_rejected=lambda path, reason: rejected.append((path.name, reason)))
    assert found is not None
    assert found[0] == tmp_path / "step-0000000002"
    assert found[1] == verify(found[0])
    assert [name for name, _ in rejected] == ["step-0000000010", "step-0000000003"]
    assert "weights.bin" in rejected[0][1]
    assert len(list(tmp_path.iterdir())) == 6  # nothing was deleted


def test_the_one_before_is_used_whatever_byte_of_the_newest_is_changed_or_cut(tmp_path: Path) -> None:
    before, newest = tmp_path / "step-0000000001", tmp_path / "step-0000000002"
    for directory in (before, newest):
        commit_content(directory)
    rejected: list[Path] = []

    def found() -> Path:
        verified = newest_verified(tmp_path, on_rejected=lambda path, _: rejected.append(path))
        assert verified is not None
        return verified[0]

    assert found() == newest
    num_damages = 0
    for name in FILES:
        content = (newest / name).read_bytes()
        file = os.open(newest / name, os.O_RDWR)
        for position, byte in enumerate(content):
            os.pwrite(file, bytes([byte ^ 1]), position)
            assert found() == before
            os.pwrite(file, bytes([byte]), position)
        for length in range(len(content)):
            os.truncate(file, length)
            assert found() == before
            os.pwrite(file, content, 0)
        os.close(file)
        num_damages += 2 * len(content)
    assert rejected == [newest] * num_damages
    assert found() == newest


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_verified(tmp_path / "nothing", on_rejected=lambda path, reason: pytest.fail(reason)) is None
    assert newest_verified(tmp_path, on_rejected=lambda path, reason: pytest.fail(reason)) is None


def test_a_passing_failure_to_read_is_not_taken_for_damage(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of file descriptors: falling back to an older checkpoint would lose work for nothing."""

    def look_without_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0),) * 2)  # dup returns the lowest that was free
        with pytest.raises(StorageError, match="Too many open files"):
            verify(committed)

    assert in_child(look_without_descriptors) == 0

    def fail(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(protocol, "_measure", fail)
    with pytest.raises(StorageError, match="Too many open files"):
        newest_verified(committed.parent, on_rejected=lambda path, reason: pytest.fail(reason))


def test_an_unreadable_block_is_damage(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(protocol, "_measure", fail)
    rejected: list[str] = []
    assert newest_verified(committed.parent, on_rejected=lambda path, reason: rejected.append(reason)) is None
    assert "Input/output error" in rejected[0]
