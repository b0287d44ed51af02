"""Commits by a process of their own: the same bytes, whoever dies and when; nothing is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from storage_faults import start_child, wait_child

from shoal.errors import StorageError, SupersededError
from shoal.storage import DiskStore, Fence, background, collect_orphans, verify
from shoal.storage.background import BackgroundWriter, Span, WriterLost
from shoal.storage.owner import start_ticks
from waiting import wait_until

SIZE_BYTES = 10 * 2**20
CONTENT: dict[str, Span | bytes] = {"large": Span(4096, SIZE_BYTES - 4096), "small": b"{}", "empty": b""}


@pytest.fixture(scope="module")
def memory() -> Iterator[int]:
    """Shared memory full of bytes."""
    descriptor = os.memfd_create("test")
    os.write(descriptor, random.Random(0).randbytes(SIZE_BYTES))
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def writer(memory: int) -> Iterator[BackgroundWriter]:
    writer = BackgroundWriter(memory)
    yield writer
    pid = writer.pid
    writer.close()
    assert pid is None or start_ticks(pid) is None, "the process outlives `close`"


def test_it_commits_what_lies_in_memory(tmp_path: Path, memory: int, writer: BackgroundWriter) -> None:
    size_bytes = writer.commit(tmp_path / "parent" / "target", CONTENT, meta={"step": 7})
    manifest = verify(tmp_path / "parent" / "target")
    assert (manifest.meta, manifest.size_bytes) == ({"step": 7}, size_bytes)
    assert (tmp_path / "parent" / "target" / "large").read_bytes() == os.pread(memory, SIZE_BYTES, 4096)
    assert (tmp_path / "parent" / "target" / "small").read_bytes() == b"{}"
    first = writer.pid
    writer.commit(tmp_path / "parent" / "next", CONTENT, meta={})
    assert writer.pid == first, "one process serves all commits"
    assert os.getpriority(os.PRIO_PROCESS, first or 0) > os.getpriority(os.PRIO_PROCESS, 0)
    os.kill(first or 0, signal.SIGINT)  # Ctrl-C reaches the whole group
    writer.commit(tmp_path / "parent" / "third", CONTENT, meta={})
    assert writer.pid == first


def test_a_failure_is_the_one_that_a_commit_here_would_raise(
    tmp_path: Path, writer: BackgroundWriter
) -> None:
    writer.start()
    assert writer.pid is not None
    wait_until(lambda: _ignores_sigint(writer.pid or 0), "the process is ready")
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
    with pytest.raises(StorageError, match=r"cannot commit .*target: File too large .* free some space"):
        writer.commit(tmp_path / "target", CONTENT, meta={})
    assert list(tmp_path.iterdir()) == []
    assert writer.commit(tmp_path / "target", {"small": b"{}"}, meta={}) == 2
    with pytest.raises(StorageError, match="it exists already"):
        writer.commit(tmp_path / "target", {"small": b"{}"}, meta={})


def _ignores_sigint(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    return bool(ignored & (1 << (signal.SIGINT - 1)))


def test_who_has_lost_the_right_to_write_is_told_so(tmp_path: Path, writer: BackgroundWriter) -> None:
    fence = Fence(DiskStore(tmp_path / "fence"))
    old = fence.take()
    writer.commit(tmp_path / "first", {"small": b"{}"}, meta={}, guard=old.check)
    fence.take()
    with pytest.raises(SupersededError):
        writer.commit(tmp_path / "second", {"small": b"{}"}, meta={}, guard=old.check)
    assert not (tmp_path / "second").exists()


def test_killed_at_any_moment_it_commits_all_or_nothing_and_is_replaced(
    tmp_path: Path, writer: BackgroundWriter
) -> None:
    began = time.monotonic()
    writer.commit(tmp_path / "first", CONTENT, meta={})
    took_s = time.monotonic() - began
    seed = random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    said = []
    for number in range(6):
        target = tmp_path / f"target-{number}"
        writer.start()
        killer = threading.Timer(draw.uniform(0, took_s), _kill, (writer.pid,))
        killer.start()
        try:
            writer.commit(target, CONTENT, meta={})
        except WriterLost as lost:
            said.append(str(lost))
            if not target.exists():
                writer.commit(target, CONTENT, meta={})
        killer.join()
        verify(target)
    assert said, f"seed {seed}: nobody was killed"
    assert all("signal 9" in text for text in said), f"seed {seed}: {said}"
    collect_orphans(tmp_path)
    assert len(list(tmp_path.iterdir())) == 7, f"seed {seed}"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_parent_that_is_killed_takes_it_along(tmp_path: Path, memory: int) -> None:
    told = tmp_path / "pid"

    def commit_for_ever() -> None:
        writer = BackgroundWriter(memory)
        writer.start()
        told.write_text(str(writer.pid))
        if os.fork() == 0:  # holds the parent's end of the channel open, as a loader's process does
            os.setpgid(0, 0)
            time.sleep(60)
        for number in range(10**6):
            writer.commit(tmp_path / "parent" / str(number), CONTENT, meta={})

    parent = start_child(commit_for_ever)
    wait_until(lambda: (tmp_path / "parent" / "0").exists(), "a commit is there")
    pid = int(told.read_text())
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    assert start_ticks(pid) is not None
    os.kill(parent, signal.SIGKILL)
    wait_child(parent)
    wait_until(lambda: start_ticks(pid) is None, "the process is gone", timeout_s=30)
    for child in children:
        if int(child) != pid:
            os.kill(int(child), signal.SIGKILL)
    collect_orphans(tmp_path / "parent")
    for left in (tmp_path / "parent").iterdir():
        verify(left)


def test_one_that_hangs_is_ended(
    tmp_path: Path, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.storage.background.PATIENCE_S", 0.01)
    writer.start()
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGSTOP)
    with pytest.raises(StorageError, match="counts as hung"):
        writer.commit(tmp_path / "target", {"small": b"{}"}, meta={})
    assert writer.pid is None


@pytest.mark.parametrize("refuses", ["nothing", "the flag", "the write", "half of a write"])
def test_around_the_page_cache_or_through_it_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    memory = mmap.mmap(-1, 2 * background.CHUNK_BYTES + 4096)
    memory.write(os.urandom(len(memory)))
    content = memoryview(memory)[: len(memory) - 5]
    direct: list[bool] = []
    write = background._write_direct

    def noted(file: io.FileIO, chunk: memoryview) -> bool:
        if refuses == "the write":
            background._set_direct(file, False)
            direct.append(False)
        elif refuses == "half of a write":
            file.write(chunk[:8192])
            background._set_direct(file, False)
            direct.append(False)
        else:
            direct.append(write(file, chunk))
        return direct[-1]

    monkeypatch.setattr(background, "_write_direct", noted)
    if refuses == "the flag":
        monkeypatch.setattr(background, "_set_direct", lambda file, is_direct: False)
    parent = os.pidfd_open(os.getpid())
    entry = background._WhileParentLives(parent).write_measured(tmp_path / "file", content)
    os.close(parent)
    assert (tmp_path / "file").read_bytes() == content
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    if refuses != "nothing":
        assert not any(direct)
