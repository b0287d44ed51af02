"""How often workers that failed are started again, and after what pause. Decides only; the clock is an argument."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 3600.0
"""Failures longer ago are forgiven: a run of weeks may lose a worker every day, and one that fails again and again
gives up."""
SHORT_LIFE_S = 5.0
"""An attempt that failed sooner after its start has hardly trained: what failed it is still there."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Retries:
    """At most ``limit`` new starts within `WINDOW_S`; the first at once, after short lives with growing pauses.

    ``clock`` gives seconds that never go back.
    """

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._failures: deque[float] = deque()
        self._num_short = 0
        self._started = clock()
        self.num_failures = 0
        """Since the beginning, forgiven ones included."""

    @property
    def has_more(self) -> bool:
        """Whether one more failure now would be answered with a new start."""
        return len(self._recent()) < self._limit

    def started(self) -> None:
        """An attempt begins now."""
        self._started = self._clock()

    def failed(self) -> float | None:
        """An attempt failed now: how many seconds to wait before the next; None to give up."""
        now = self._clock()
        self.num_failures += 1
        self._failures.append(now)
        if len(self._recent()) > self._limit:
            return None
        self._num_short = self._num_short + 1 if now - self._started < SHORT_LIFE_S else 0
        if self._num_short < 2:
            return 0.0
        return min(FIRST_PAUSE_S * 2.0 ** (self._num_short - 2), LONGEST_PAUSE_S)

    def _recent(self) -> deque[float]:
        """Drop the failures that are forgiven."""
        while self._failures and self._failures[0] <= self._clock() - WINDOW_S:
            self._failures.popleft()
        return self._failures
