"""Copying a committed directory: the same bytes under another name, or nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from storage_faults import CONTENT, commit_content, failing_disk, num_steps

from shoal.errors import CorruptError, StorageError
from shoal.storage import copy_committed, discard, verify


def test_a_copy_verifies_and_has_the_same_digest(tmp_path: Path) -> None:
    original = commit_content(tmp_path / "original")
    copied = copy_committed(tmp_path / "original", tmp_path / "there" / "copy")
    discard(tmp_path / "original")  # the copy is its own
    assert copied == original == verify(tmp_path / "there" / "copy")
    assert copied.digest == original.digest
    assert {name: (tmp_path / "there" / "copy" / name).read_bytes() for name in CONTENT} == CONTENT


def test_other_contents_have_another_digest(tmp_path: Path) -> None:
    from shoal.storage import commit

    first = commit_content(tmp_path / "first")
    other = commit(tmp_path / "other", lambda folder: (folder / "a").touch(), meta={"step": 7})
    assert first.digest != other.digest


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "link", "gone", "no manifest"])
def test_what_is_damaged_is_not_copied(tmp_path: Path, damage: str) -> None:
    source = tmp_path / "source"
    commit_content(source)
    victim = source / next(iter(CONTENT))
    match damage:
        case "changed":
            victim.write_bytes(bytes(len(victim.read_bytes())))
        case "cut":
            victim.write_bytes(victim.read_bytes()[:-1])
        case "missing":
            victim.unlink()
        case "link":
            content = victim.read_bytes()
            victim.unlink()
            (tmp_path / "outside").write_bytes(content)
            victim.symlink_to(tmp_path / "outside")
        case "gone":
            discard(source)
        case "no manifest":
            (source / "MANIFEST.json").unlink()
    with pytest.raises(CorruptError):
        copy_committed(source, tmp_path / "copies" / "copy")
    assert not list((tmp_path / "copies").iterdir() if (tmp_path / "copies").exists() else [])


def test_whatever_fails_nothing_is_left(tmp_path: Path) -> None:
    commit_content(tmp_path / "source")

    def copy(disk: object) -> None:
        copy_committed(tmp_path / "source", tmp_path / "copies" / "whole", disk=disk)  # type: ignore[arg-type]

    for step in range(num_steps(copy) - 1):  # the last makes sure of a directory that is there already
        target = tmp_path / f"copies-{step}" / "copy"
        with pytest.raises(StorageError):
            copy_committed(tmp_path / "source", target, disk=failing_disk(step, errno.ENOSPC))
        assert not target.exists()
    verify(tmp_path / "source")


def test_an_existing_target_is_never_touched(tmp_path: Path) -> None:
    commit_content(tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(StorageError, match="exists already"):
        copy_committed(tmp_path / "source", target)
    assert not list(target.iterdir())
