"""What a worker says about itself, cheap enough for steps of milliseconds: how far it is, in what, and since when.

`heart` is the one of this process. The session, the boundary and the group beat it from the training thread; anybody
may `Heart.read` it from another. Beating costs 0.3 microseconds a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Phase = Literal["set up", "step", "evaluate", "save", "done"]
"""What a worker is in. ``set up`` lasts until there is a step whose duration is known: the second of an attempt, as
the first may compile and fill caches."""

NUM_DURATIONS = 64
"""Over how many of the last steps the median is taken."""


@dataclass(frozen=True)
class Pulse:
    """What a worker says when it is asked. Ages are its own: clocks differ from machine to machine."""

    phase: Phase
    steps: int
    """Steps done."""
    age_s: float
    """How long ago it last moved: completed a step, began or ended a phase, measured a batch."""
    is_waiting: bool
    """Whether its training thread waits in a collective now, for its peers."""
    step_s: float | None
    """The median of its last steps, without what happened between them; None during set-up."""
    thread: int
    """Which thread trains, as ``threading.get_ident`` calls it; 0 before the first attempt."""


class Heart:
    """Beaten by one thread, read by others. Before an `attempt` it says that it is being set up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase: Phase
        self._is_eventful = threading.Event()
        """Set but while steps follow each other."""
        self._thread = 0
        self._begin()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """While this thread takes part in a run; nothing is expected of it afterwards."""
        self._thread = threading.get_ident()
        self._begin()
        try:
            yield
        finally:
            self._enter("done")

    def begin_again(self) -> None:
        """Within an `attempt`: it is set up anew, by the same thread."""
        self._begin()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if phase == "step":
            self._is_eventful.clear()
        else:
            self._is_eventful.set()

    def _begin(self) -> None:
        self._enter("set up")
        self._steps = 0
        self._durations = [0.0] * NUM_DURATIONS
        self._num = -1  # the first step's duration is not counted
        self.waiting = _Waiting()
        self._moved = self._began = self._clock()

    def step(self, steps: int) -> None:
        """A step was completed; ``steps`` are done."""
        now = self._clock()
        if self._num >= 0:
            self._durations[self._num % NUM_DURATIONS] = now - self._began
            if self._phase != "step":
                self._enter("step")
        self._num += 1
        self._steps = steps
        self._moved = self._began = now

    def beat(self) -> None:
        """It goes on, within a step or a phase."""
        self._moved = self._clock()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """While something else than a step goes on; the time is no step's. Set-up stays set-up."""
        before = self._phase
        if before != "set up":
            self._enter(phase)
        self.beat()
        try:
            yield
        finally:
            self._enter(before)
            self._moved = self._began = self._clock()

    def wait_while_uneventful(self, timeout_s: float) -> bool:
        """Block another thread while steps follow each other, at most ``timeout_s``; False if they still do then."""
        return self._is_eventful.wait(timeout_s)

    def read(self) -> Pulse:
        """What can be said now; from any thread."""
        known = sorted(self._durations[: max(0, min(self._num, NUM_DURATIONS))])
        return Pulse(
            phase=self._phase,
            steps=self._steps,
            age_s=self._clock() - self._moved,
            is_waiting=self.waiting.now,
            step_s=known[len(known) // 2] if known else None,
            thread=self._thread,
        )


class _Waiting:
    """``with heart.waiting:`` around whatever ends only when the peers have come too. Not nested."""

    now = False

    def __enter__(self) -> None:
        self.now = True

    def __exit__(self, *_: object) -> None:
        self.now = False


heart = Heart()
