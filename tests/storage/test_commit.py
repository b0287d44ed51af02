"""Writing: all or nothing, whatever fails and whenever the process dies."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from storage_faults import (
    CONTENT,
    commit_content,
    dying_disk,
    failing_disk,
    in_child,
    num_steps,
    write_content,
)

from shoal.errors import CorruptError, StorageError
from shoal.storage import MANIFEST, Disk, collect_orphans, commit, discard, newest_verified, verify


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_what_is_committed_is_what_was_written(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "parents" / "target"
    manifest = commit_content(directory)
    assert manifest == verify(directory)
    assert manifest.meta == {"step": 7, "sizes": [1, 2]}
    assert list(manifest.files) == sorted(CONTENT)
    assert manifest.size_bytes == sum(map(len, CONTENT.values()))
    assert {name: (directory / name).read_bytes() for name in CONTENT} == CONTENT
    assert names(directory.parent) == ["target"]


def test_everything_is_private_to_its_owner(tmp_path: Path) -> None:
    commit_content(tmp_path / "a" / "b")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert modes == {0o600}
    folders = {path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*") if path.is_dir()}
    assert folders | {(tmp_path / "a").stat().st_mode & 0o777} == {0o700}


@pytest.mark.parametrize("kind", ["committed", "empty", "file", "dangling link"])
def test_an_existing_target_is_never_touched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    match kind:
        case "committed":
            commit(target, lambda path: None, meta={"first": True})
        case "empty":
            target.mkdir()
        case "file":
            target.write_text("mine")
        case "dangling link":
            target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="exists already"):
        commit_content(target)
    assert names(tmp_path) == ["target"]
    if kind == "committed":
        assert verify(target).meta == {"first": True}


def test_of_two_writers_of_one_name_the_first_to_publish_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write_while_another_commits(path: Path) -> None:
        commit(target, write_content, meta={"writer": "other"})
        write_content(path)

    with pytest.raises(StorageError, match="exists already"):
        commit(target, write_while_another_commits, meta={"writer": "slow"})
    assert verify(target).meta == {"writer": "other"}
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError("recipe"), KeyboardInterrupt()])
def test_an_exception_from_the_writer_passes_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write(path: Path) -> None:
        write_content(path)
        raise error

    with pytest.raises(type(error)):
        commit(tmp_path / "target", write, meta={})
    assert names(tmp_path) == []


def test_a_writer_may_not_leave_links_or_take_the_name_of_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="link"):
        commit(tmp_path / "a", lambda path: (path / "x").symlink_to("/etc/hostname"), meta={})
    with pytest.raises(StorageError, match=MANIFEST):
        commit(tmp_path / "a", lambda path: (path / MANIFEST).touch(), meta={})
    assert names(tmp_path) == []


def test_any_failing_call_is_reported_and_leaves_nothing_or_a_verified_directory(tmp_path: Path) -> None:
    steps = num_steps(lambda disk: commit_content(tmp_path / "counted" / "target", disk=disk))
    assert (
        steps == 12
    )  # parent: make, sync; temporary: make; 4 files; manifest; 2 folders; publish; sync parent
    for step in range(steps):
        target = tmp_path / f"fail-{step}" / "target"
        with pytest.raises(StorageError) as raised:
            commit_content(target, disk=failing_disk(step))
        assert str(target) in str(raised.value)
        assert "No space left" in str(raised.value)
        assert "free there" in str(raised.value)
        if step == steps - 1:  # only the last sync is missing: it is there, but a power cut might take it
            assert names(target.parent) == ["target"]
            verify(target)
        else:
            assert names(target.parent) == []


def test_dying_at_any_point_leaves_nothing_or_a_verified_directory(tmp_path: Path) -> None:
    steps = num_steps(lambda disk: commit_content(tmp_path / "counted" / "target", disk=disk))
    seen = set()
    for step in range(steps):
        target = tmp_path / f"die-{step}" / "target"
        code = in_child(lambda target=target, step=step: commit_content(target, disk=dying_disk(step)))
        assert code == -signal.SIGKILL
        newest = newest_verified(target.parent, on_rejected=lambda path, reason: pytest.fail(reason))
        seen.add(newest is not None)
        orphans = collect_orphans(target.parent)
        assert names(target.parent) == (["target"] if newest else [])
        assert len(orphans) == (1 if 2 < step < steps - 1 else 0)
        if newest is None:
            commit_content(target)
        verify(target)
    assert seen == {True, False}


def test_dying_while_the_writer_writes(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        write_content(path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: commit(tmp_path / "target", write, meta={})) == -signal.SIGKILL
    assert newest_verified(tmp_path, on_rejected=lambda path, reason: pytest.fail(reason)) is None
    assert len(collect_orphans(tmp_path)) == 1
    assert names(tmp_path) == []


def test_dying_while_discarding_never_leaves_half_a_directory(tmp_path: Path) -> None:
    def prepared(name: str) -> Path:
        commit_content(tmp_path / name / "target")
        return tmp_path / name / "target"

    counted = prepared("counted")
    steps = num_steps(lambda disk: discard(counted, disk=disk))
    assert names(counted.parent) == []
    for step in range(steps):
        target = prepared(f"die-{step}")
        assert (
            in_child(lambda target=target, step=step: discard(target, disk=dying_disk(step)))
            == -signal.SIGKILL
        )
        if target.exists():
            verify(target)
            discard(target)
        collect_orphans(target.parent)
        assert names(target.parent) == []
    discard(counted)  # again: fine


def test_dying_among_the_files_of_a_discarded_directory(committed: Path) -> None:
    def discard_and_die() -> None:
        os.unlink = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        discard(committed)

    assert in_child(discard_and_die) == -signal.SIGKILL
    assert not committed.exists()
    assert len(collect_orphans(committed.parent)) == 1


def test_a_file_that_grows_beyond_the_limit_of_the_process(tmp_path: Path) -> None:
    """A real failure of write(2) half way, without root: RLIMIT_FSIZE."""

    def commit_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(StorageError, match=r"File too large .* free there"):
            commit(tmp_path / "target", lambda path: (path / "big").write_bytes(bytes(10_000)), meta={})

    assert in_child(commit_too_much) == 0
    assert names(tmp_path) == []


FULL_DISK = """
import sys
from pathlib import Path
from shoal.errors import StorageError
from shoal.storage import commit, verify
root = Path(sys.argv[1])
commit(root / "small", lambda path: (path / "data").write_bytes(bytes(1000)), meta={})
try:
    commit(root / "large", lambda path: (path / "data").write_bytes(bytes(1 << 20)), meta={})
except StorageError as error:
    assert "No space left" in str(error), error
else:
    raise AssertionError("it fitted")
assert [path.name for path in root.iterdir()] == ["small"], list(root.iterdir())
verify(root / "small")
commit(root / "next", lambda path: (path / "data").write_bytes(bytes(1000)), meta={})
print("survived")
"""


def test_a_full_disk_keeps_what_was_committed(tmp_path: Path) -> None:
    """On a real file system of 256 KiB, in a mount namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    # $0 is the mount point; 77 says that this machine does not let us mount.
    script = 'mount -t tmpfs -o size=256k none "$0" || exit 77; exec "$@"'
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(tmp_path), sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip("may not mount here")
    assert (result.stdout, result.returncode) == ("survived\n", 0), result.stderr


def test_what_cannot_be_cleaned_up_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Disk, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Disk, "remove", refuse)
    with pytest.raises(StorageError, match="No space left"):
        commit_content(tmp_path / "target", disk=failing_disk(4))
    assert "could not delete" in caplog.text
    assert newest_verified(tmp_path, on_rejected=lambda path, reason: pytest.fail(reason)) is None


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, os.rename

    def recorded_sync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    commit_content(tmp_path / "target")
    temporary = next(name for name in events if name.startswith(".target."))
    files = ["rank-0", "rank-1", "state.json", "weights.bin"]
    assert events == [*files, MANIFEST, "parts", temporary, "rename", tmp_path.name]
