"""The record as those write it who train: a full disk makes its lines wait, and does not end the run."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from shoal.errors import StorageError, SupersededError
from shoal.storage import Storage, is_full
from shoal.storage.disk import FILE_MODE
from shoal.tracking import RunRecord
from shoal.tracking.journal import encode

RESERVE_BYTES = 256 * 2**10
"""Kept while the disk has room, and given up when it is full, so that the run can still say how it ended."""
MAX_WAITING = 1000
"""Lines that wait in memory; of more, the oldest metrics are dropped."""
RETRY_S = 1.0
"""How often it is tried whether there is room again, at most; a try writes the reserve."""
_LAST = frozenset({"end", "resize"})
"""Lines after which nobody waits for room any more."""

logger = logging.getLogger(__name__)


class _Line(NamedTuple):
    kind: str
    text: str


class PatientRecord(RunRecord):
    """A `RunRecord` whose ``append`` does not fail because the disk is full, but for an attempt's last line.

    ``now`` gives seconds that never go back.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        clock: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(storage, name, clock=clock)
        self._now = now
        self._reserve_path = self.dir / "reserve"
        self._is_reserving = False
        self._lock = threading.RLock()  # checkpoints are recorded by the thread that writes them
        self._waiting: deque[_Line] = deque()
        self._is_waiting = False
        self._num_dropped = 0
        self._tried = now()
        self._without_room: set[str] = set()

    @property
    def attempt(self) -> int:
        """How often the run was started; a start whose line waits counts too."""
        return super().attempt + sum(line.kind == "start" for line in self._waiting)

    @contextmanager
    def reserving(self, *, is_mine: bool) -> Iterator[None]:
        """Hold some room on the disk meanwhile, where that is this process's to do; where there is none, none."""
        self._is_reserving = is_mine
        if is_mine:
            self._reserve()
        try:
            yield
        finally:
            self._write_last_chance()
            self._release()
            self._is_reserving = False

    def is_full(self, what: str, message: str) -> None:
        """Say that there is no room for ``what``; once, until `has_room`."""
        if what not in self._without_room:
            self._without_room.add(what)
            logger.error("%s", message)
            self.append("disk_full", what=what, is_over=False, message=message)

    def has_room(self, what: str) -> None:
        """Say that there is room for ``what`` again, if it was said that there is none."""
        if what in self._without_room:
            self._without_room.remove(what)
            self.append("disk_full", what=what, is_over=True, message=f"there is room for the {what} again")

    def _write(self, kind: str, line: str) -> None:
        with self._lock:
            if self._is_waiting and (kind in _LAST or self._now() - self._tried >= RETRY_S):
                self._try_again()
            if kind in _LAST:
                self._release()  # before: who dies right after the line would leave it for ever
            if self._is_waiting and kind in _LAST:
                self._write_what_matters()
                super()._write(kind, line)
            elif self._is_waiting:
                self._wait(_Line(kind, line))
            else:
                self._write_or_wait(_Line(kind, line))

    def _write_last_chance(self) -> None:
        """What waits when nobody will come again."""
        with self._lock, suppress(StorageError, SupersededError):
            if self._is_waiting:
                if self._guard is not None:
                    self._guard()
                self._try_again()
            if self._is_waiting:
                self._write_what_matters()

    def _write_or_wait(self, line: _Line) -> None:
        try:
            super()._write(*line)
        except StorageError as err:
            if not is_full(err):
                raise
            self._is_waiting = True
            self._tried = self._now()
            self._release()
            if line.kind in _LAST:
                super()._write(*line)  # into the room that is free now
                return
            self._wait(line)
            message = f"{err} Its lines wait in memory, and training goes on"
            with suppress(StorageError):
                self._say(is_over=False, message=message)
            logger.error("%s", message)  # last: what is printed may go to the same disk

    def _wait(self, line: _Line) -> None:
        self._waiting.append(line)
        if len(self._waiting) > MAX_WAITING:
            least = next((each for each in self._waiting if each.kind == "metrics"), self._waiting[0])
            self._waiting.remove(least)
            self._num_dropped += 1

    def _try_again(self) -> None:
        """Write what waits, in its order, if there is room for it and for the reserve."""
        self._tried = self._now()
        if not self._reserve():
            return
        try:
            while self._waiting:
                super()._write(*self._waiting[0])
                self._waiting.popleft()
            dropped = f"; {self._num_dropped} lines of metrics were dropped" if self._num_dropped else ""
            self._say(is_over=True, message=f"there is room for the journal again{dropped}")
        except StorageError as err:
            if not is_full(err):
                raise
            self._release()
            return
        self._is_waiting = False
        self._num_dropped = 0

    def _write_what_matters(self) -> None:
        """All but metrics, into the room that the reserve had, as far as half of it goes."""
        room = RESERVE_BYTES // 2
        for line in [each for each in self._waiting if each.kind != "metrics"]:
            room -= len(line.text)
            if room < 0:
                break
            with suppress(StorageError):
                super()._write(*line)
        self._waiting.clear()

    def _say(self, *, is_over: bool, message: str) -> None:
        fields = {"what": "journal", "is_over": is_over, "message": message}
        line = encode("disk_full", t=self._clock(), attempt=max(1, self.attempt), fields=fields)
        super()._write("disk_full", line)

    def _reserve(self) -> bool:
        """Whether there is room for it, and it is there, where this process is to keep one."""
        if not self._is_reserving:
            return True
        try:
            descriptor = os.open(self._reserve_path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
            with open(descriptor, "wb") as file:
                if os.fstat(descriptor).st_size != RESERVE_BYTES:
                    file.write(os.urandom(RESERVE_BYTES))  # zeros take no room on some disks
        except OSError as err:
            self._release()
            if not is_full(err):
                logger.warning("no room is reserved for the last lines of %s", self.name, exc_info=True)
            return False
        return True

    def _release(self) -> None:
        if not self._is_reserving:
            return
        with suppress(OSError):
            self._reserve_path.unlink(missing_ok=True)
