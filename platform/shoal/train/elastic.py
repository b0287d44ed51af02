"""A driver's eye on how many workers its run has, should have, and could have."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.capacity import Steady, next_size, restart_range
from shoal.config import Range
from shoal.errors import EnvironmentFailure
from shoal.tracking import JournalSummary, RunRecord, Wish

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often a driver looks at the wish and at what is free."""


class Elastic:
    """Decides when the workers of one run are to be another number, and orders it. May be shared by threads.

    Args:
        wish: what the run is started with; `begin` writes it down.
        free_room: how many more workers would fit now (`capacity.room`).
    """

    def __init__(self, record: RunRecord, wish: Wish, free_room: Callable[[], float]) -> None:
        self._record = record
        self._free_room = free_room
        self._wish = wish
        self._earlier_attempts: int | None = None
        self._steady = Steady()
        self._order: tuple[int, int] | None = None
        """Attempt and number of the last order; what became of it is judged at the next attempt."""
        self._is_ordered = False
        self._is_readable = True

    def begin(self) -> None:
        """Write down what the run is started with; from now on it can be asked for another number.

        The caller drives the run: nobody else writes its record.

        Raises:
            StorageError: it cannot be written.
        """
        self._earlier_attempts = self._record.attempt
        self._record.resizing.begin(self._wish)

    def wanted(self) -> Range:
        """How many workers may start now. Those that had begun go on with as many, be they fewer than is wished."""
        wish = self._read_wish().reachable
        seen = self._record.summary()
        if seen.workers is None or not self._is_ours(seen):
            return wish
        planned = wish.max if seen.resize is None else seen.resize["to"]
        return restart_range(wish, before=seen.workers, planned=planned)

    def is_between(self) -> bool:
        """Whether the workers ended for another number to go on, and those have not begun."""
        seen = self._record.summary()
        return self._is_ours(seen) and seen.resize is not None

    def look(self) -> None:
        """Order another number of workers, or take an order back, as wish and room are now.

        Raises:
            StorageError: it cannot be written.
            ClusterError: the cluster does not say what is free.
        """
        wish = self._read_wish().reachable
        seen = self._record.summary()
        if (
            not self._is_ours(seen)
            or seen.workers is None
            or seen.resize is not None
            or seen.ended is not None
        ):
            return  # nobody trains
        attempt, current = seen.attempt, seen.workers
        self._judge(attempt, current)
        free_room = self._free_room() if current < wish.max else 0
        size = self._steady.settle(attempt, current, next_size(wish, current, free_room))
        if size == current:
            if self._is_ordered:
                self._record.resizing.withdraw()
                self._order, self._is_ordered = None, False
        elif self._order != (attempt, size):
            self._record.resizing.order(attempt, size)
            self._order, self._is_ordered = (attempt, size), True

    def _is_ours(self, seen: JournalSummary) -> bool:
        """Whether workers of this driver have begun: what the record says is about them."""
        return self._earlier_attempts is not None and seen.attempt > self._earlier_attempts

    def _judge(self, attempt: int, current: int) -> None:
        if self._order is not None and self._order[0] < attempt:
            self._steady.judge(got_it=current >= self._order[1])
            self._order = None

    def _read_wish(self) -> Wish:
        """The wish as it is now; if that cannot be read, as it was."""
        try:
            self._wish = self._record.resizing.wish() or self._wish
            self._is_readable = True
        except EnvironmentFailure as error:
            if self._is_readable:
                self._is_readable = False
                logger.warning(
                    "run %s: %s workers are wished as before: %s",
                    self._record.name,
                    self._wish.workers,
                    error,
                )
        return self._wish


@contextmanager
def looking(look: Callable[[], None], *, every_s: float = LOOK_EVERY_S) -> Iterator[None]:
    """Have a thread ``look`` every so often; where it fails, the next look tries again."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            try:
                look()
            except EnvironmentFailure:
                logger.warning("could not look whether the number of workers is to change", exc_info=True)

    thread = threading.Thread(target=watch, name="shoal-elastic", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=every_s)  # a cluster that is gone may keep it waiting
