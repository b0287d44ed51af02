"""A lock between processes that the kernel releases when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shoal.errors import CorruptError, DeadlineExceeded
from shoal.storage.disk import FILE_MODE, make_directories, open_plain, storage_error

_POLL_S = 0.05
_GRACE_S = 0.2
"""Even a single try outlasts somebody who looks whether the lock is held, and takes it for a moment."""
_MAX_OWNER_BYTES = 4096


class FileLock:
    """Exclusive use of ``path``, held by one `FileLock` of one process at a time (flock).

    The file stays when the lock is released; it holds who has or had it, for messages only. A forked child
    does not keep the lock alive when its parent is killed.
    """

    def __init__(self, path: Path, *, timeout_s: float = 0.0) -> None:
        """``timeout_s`` is how long `acquire` and ``with`` wait for another holder; 0 hardly waits."""
        self.path = path
        self.timeout_s = timeout_s
        self._descriptor: int | None = None

    def acquire(self, *, timeout_s: float | None = None) -> None:
        """Take the lock; with it, nothing happens. ``timeout_s`` replaces that of the constructor, for once.

        Raises:
            DeadlineExceeded: another holder still has it; the message says who.
            StorageError: the file cannot be opened.
        """
        if self._descriptor is not None:
            return
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + max(timeout_s, _GRACE_S)
        try:
            descriptor = self._open()
            try:
                while not _try_lock(descriptor, fcntl.LOCK_EX):
                    if time.monotonic() >= deadline:
                        raise DeadlineExceeded(f"{self.path} is locked by {self._holder_text()}")
                    time.sleep(_POLL_S)
                self._write_owner(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise storage_error("lock", self.path, error) from error
        self._descriptor = descriptor
        _held.add(self)

    def release(self) -> None:
        """Give the lock back; without it, nothing happens."""
        if self._descriptor is not None:
            _held.discard(self)
            os.close(self._descriptor)
            self._descriptor = None

    def owner(self) -> Mapping[str, Any] | None:
        """Who took the lock last: ``pid``, ``host`` and ``since`` (epoch seconds); None when nobody did."""
        try:
            with open_plain(self.path) as file:
                owner = json.loads(file.read(_MAX_OWNER_BYTES))
        except (CorruptError, OSError, ValueError):  # never taken, or being taken right now
            return None
        return owner if isinstance(owner, dict) else None

    def is_held(self) -> bool:
        """Whether some holder, this object included, has the lock at this moment."""
        if self._descriptor is not None:
            return True
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error("lock", self.path, error) from error
        try:
            return not _try_lock(descriptor, fcntl.LOCK_SH)  # shared: two who look do not see each other
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self) -> int:
        make_directories(self.path.parent)
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)

    def _write_owner(self, descriptor: int) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with contextlib.suppress(OSError):  # it is for messages only: a full disk must not deny the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)

    def _holder_text(self) -> str:
        owner = self.owner()
        return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"

    def _forget(self) -> None:
        """In a forked child: close our copy, which would outlive the parent and keep the lock."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_all)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
