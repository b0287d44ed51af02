"""How often to checkpoint so that it costs no more than a share of the time. Decides only, from what was measured."""

from __future__ import annotations

import statistics
from collections import deque

SHARE = 0.01
"""Of the training's time, how much checkpoints may cost."""
FIRST_S = 30.0
"""Before anything was measured."""
MIN_S, MAX_S = 10.0, 600.0
"""The least saves disks, and nobody misses ten seconds of work; the most is what a crash may cost at worst."""
_NUM_STEPS, _NUM_COSTS = 64, 5


class Budget:
    """The interval between checkpoints, from the seconds that each of the last ones cost.

    A checkpoint costs the pause at its step boundary, and what the steps while it is copied and written take more
    than the median of the steps beside which nothing is written.
    """

    def __init__(self) -> None:
        self._usual_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._costs_s: deque[float] = deque(maxlen=_NUM_COSTS)
        self._pause_s: float | None = None
        """Of the checkpoint under way; None while there is none."""
        self._extra_s = 0.0

    @property
    def interval_s(self) -> float:
        """Seconds from one checkpoint to the next."""
        if not self._costs_s:
            return FIRST_S
        return min(max(statistics.median(self._costs_s) / SHARE, MIN_S), MAX_S)

    def paused(self, seconds: float) -> None:
        """A checkpoint began, and training waited so long for that."""
        self._end()
        self._pause_s = seconds

    def stepped(self, seconds: float, *, is_writing: bool) -> None:
        """A step took so long, between two boundaries; ``is_writing``: a checkpoint was under way meanwhile."""
        if not is_writing:
            self._end()
            self._usual_s.append(seconds)
        elif self._pause_s is not None and self._usual_s:
            self._extra_s += seconds - statistics.median(self._usual_s)

    def _end(self) -> None:
        if self._pause_s is not None:
            # Noise may make the steps beside it seem faster than others; the pause was there for certain.
            self._costs_s.append(self._pause_s + max(0.0, self._extra_s))
        self._pause_s, self._extra_s = None, 0.0
