"""A process of low priority that commits what lies in shared memory, while its parent goes on.

The parent (`BackgroundWriter`) says what to commit; the process writes, hashes and syncs it by the one commit
protocol. It holds nothing but the shared memory and a channel, loads the standard library alone, and ends with its
parent: at once when that dies, leaving what `collect_orphans` deletes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

from shoal.errors import ShoalError, StorageError
from shoal.storage.commit import FileEntry, commit
from shoal.storage.disk import FILE_MODE, Disk

NICENESS = 10
"""Added to the parent's. Lower still (19, or SCHED_IDLE) starves where others keep the machine busy, and a process
without privileges cannot be lifted again when somebody waits for the last checkpoint."""
CHUNK_BYTES = 4 * 2**20
MIN_BYTES_PER_S = 2**20
"""A disk that is slower than this counts as hung, after `PATIENCE_S`."""
PATIENCE_S = 60.0
_END_TIMEOUT_S = 5.0
_ALIGNMENT = 4096
"""Of writes around the page cache: the memory's pages, and no less than any disk's blocks."""
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from shoal.storage.background import serve; serve()"


class Span(NamedTuple):
    """A part of the shared memory."""

    begin: int
    size_bytes: int


Content = Mapping[str, Span | bytes]
"""What is in each file: a part of the shared memory, or bytes."""


def unguarded() -> None:
    """Nobody else may write."""


class WriterLost(Exception):
    """The process died; nothing, or all of it, was committed. The next `commit` starts another."""


class BackgroundWriter:
    """Commits from the shared memory ``memory`` (a descriptor, which must stay open) by a process of its own.

    For one thread at a time. `close` ends the process.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection[Any, Any] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process if it does not run; does not wait for it to be ready.

        Raises:
            StorageError: the machine has no room for it.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._end(now=True)  # it died with nothing to do
        mine, its = Pipe()
        root = str(Path(__file__).parents[2])
        fds = (its.fileno(), self._memory)
        arguments = [root, str(os.getpid()), *map(str, fds)]
        try:
            # Without site-packages (-S): it needs none of them, and starts in a fifth of the time.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, *arguments], pass_fds=fds, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            mine.close()
            raise StorageError(f"cannot start the process that writes checkpoints: {error}") from error
        finally:
            its.close()
        self._channel = mine

    def commit(
        self,
        directory: Path,
        content: Content,
        *,
        meta: Mapping[str, Any],
        guard: Callable[[], None] = unguarded,
    ) -> int:
        """Commit ``directory`` with these files, as `storage.commit` does; returns their size in bytes. Blocks.

        ``guard`` travels to the process by pickle.

        Raises:
            SupersededError: as `storage.commit`.
            StorageError: as `storage.commit`; or the disk is so slow that it counts as hung.
            WriterLost: the process died.
        """
        self.start()
        assert self._channel is not None
        size_bytes = sum(
            part.size_bytes if isinstance(part, Span) else len(part) for part in content.values()
        )
        try:
            self._channel.send((str(directory), dict(content), dict(meta), guard))
            timeout_s = PATIENCE_S + size_bytes / MIN_BYTES_PER_S
            answer = self._channel.recv() if self._channel.poll(timeout_s) else None
        except (EOFError, OSError) as error:
            raise WriterLost(f"the process that writes checkpoints died ({self._end(now=True)})") from error
        if answer is None:
            self._end(now=True)
            raise StorageError(
                f"cannot commit {directory}: not written within {timeout_s:.0f} s, so it counts as hung"
            )
        if isinstance(answer, ShoalError):
            raise answer
        return int(answer)

    def kill(self) -> None:
        """End the process at once, from any thread; a `commit` that is under way raises `WriterLost`."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process; a later `commit` starts another."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(None)
            self._end(now=False)

    def _end(self, *, now: bool) -> str:
        """Have the process end, by force if need be; how it ended."""
        assert self._process is not None
        assert self._channel is not None
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if now:
            process.kill()
        channel.close()
        for _ in range(2):
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(_END_TIMEOUT_S)
                return f"signal {-status}" if status < 0 else f"exit status {status}"
            process.kill()
        return "it does not end: its disk hangs"


def serve() -> None:
    """Be the process: commit what comes through the channel until it closes or the parent ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Whoever stops the parent (Ctrl-C reaches the whole group) waits for the last checkpoint.
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    parent_pid, channel, memory = map(int, sys.argv[2:])
    try:
        parent = os.pidfd_open(parent_pid)
    except OSError:
        return
    if os.getppid() == parent_pid:
        _serve(Connection(channel), memory, parent)


def _serve(channel: Connection[Any, Any], memory: int, parent: int) -> None:
    disk = _WhileParentLives(parent)
    shared = _SharedMemory(memory)
    # A loader that the parent forked may hold the other end of the channel open: so the parent itself is watched.
    while parent not in wait([channel, parent]):
        try:
            job = channel.recv()
        except EOFError:
            return
        if job is None:
            return
        channel.send(_commit(*job, shared=shared, disk=disk))


def _commit(
    directory: str,
    content: Content,
    meta: Mapping[str, Any],
    guard: Callable[[], None],
    *,
    shared: _SharedMemory,
    disk: _WhileParentLives,
) -> int | ShoalError:
    try:
        memory = shared.view()
        measured: dict[str, FileEntry] = {}

        def write(folder: Path) -> None:
            for name, part in content.items():
                measured[name] = disk.write_measured(folder / name, _view(part, memory))

        return commit(Path(directory), write, meta=meta, guard=guard, measured=measured, disk=disk).size_bytes
    except ShoalError as error:
        return error
    except Exception as error:  # the parent must hear of it
        return StorageError(f"writing {directory} failed: {type(error).__name__}: {error}")


def _view(part: Span | bytes, memory: memoryview) -> memoryview:
    return memory[part.begin : part.begin + part.size_bytes] if isinstance(part, Span) else memoryview(part)


class _SharedMemory:
    """The parent's memory, mapped once for each size that it had: to map it anew costs a fault for every page."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._view = memoryview(b"")

    def view(self) -> memoryview:
        """All of it, as it is now."""
        size_bytes = os.fstat(self._descriptor).st_size
        if len(self._view) != size_bytes:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._view = memoryview(mmap.mmap(self._descriptor, size_bytes, flags=flags, prot=mmap.PROT_READ))
        return self._view


def _set_direct(file: io.FileIO, is_direct: bool) -> bool:
    """Have writes go around the page cache, or through it again; False where the file system does not take it.

    Around it they cost the processor next to nothing, which the training beside needs, and push out nothing that is
    cached.
    """
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | (os.O_DIRECT if is_direct else 0))
    except OSError:
        return False
    return True


def _write_direct(file: io.FileIO, chunk: memoryview) -> bool:
    """Write around the page cache; False where it went only in part, or not at all, and is to go through it now.

    Memory, place and length must be multiples of `_ALIGNMENT`; at a file's end the length is none.
    """
    if len(chunk) % _ALIGNMENT == 0:
        try:
            if file.write(chunk) == len(chunk):
                return True
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems take the flag, and then refuse
                raise
    _set_direct(file, False)
    return False


class _WhileParentLives(Disk):
    """The disk, until the parent ends: then the process does, too, and publishes nothing any more."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def write_measured(self, path: Path, content: memoryview) -> FileEntry:
        """Create ``path`` with ``content``, which is read once for both the hash and the file. Not synced."""
        digest = hashlib.sha256()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb", buffering=0) as file:
            is_direct = len(content) >= CHUNK_BYTES and _set_direct(file, True)
            for begin in range(0, len(content), CHUNK_BYTES):
                self._check()
                chunk = content[begin : begin + CHUNK_BYTES]
                digest.update(chunk)
                is_direct = is_direct and _write_direct(file, chunk)
                if not is_direct:
                    rest = chunk[file.tell() - begin :]
                    while rest:
                        rest = rest[file.write(rest) :]
        return FileEntry(len(content), digest.hexdigest())

    def publish_directory(self, source: Path, target: Path) -> None:
        self._check()
        super().publish_directory(source, target)

    def _check(self) -> None:
        if select.select([self._parent], [], [], 0)[0]:
            os._exit(1)
