"""Trainings in alternating slices of time: while one runs, every process of the others is stopped.

How fast a shared machine is changes by a third within a minute, and alike for both. Slices of seconds see the
same machine; runs that follow each other do not.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import psutil

from benchmarks.ticks import Tick, read

START_DEADLINE_S = 120.0
SETTLE_S = 0.2
"""After a side goes on, before its steps count."""


@dataclass(frozen=True)
class Side:
    """One training: its processes, asked anew each time, and the file where its rank 0 ticks."""

    processes: Callable[[], Iterable[psutil.Process]]
    ticks: Path

    def signal(self, number: int) -> None:
        """Send a signal to every process of this side."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextlib.contextmanager
def stopped(side: Side) -> Iterator[None]:
    """Every process of ``side`` is stopped inside, and goes on after, whatever happens."""
    side.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        side.signal(signal.SIGCONT)


def wait_for_ticks(side: Side, count: int) -> None:
    """Block until ``side`` ticked ``count`` times.

    Raises:
        SystemExit: it did not within `START_DEADLINE_S`.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    while read(side.ticks).count < count:
        if time.monotonic() > deadline:
            raise SystemExit(
                f"{side.ticks.name}: {read(side.ticks).count} of {count} steps in {START_DEADLINE_S:g} s"
            )
        time.sleep(0.05)


@dataclass(frozen=True)
class Slot:
    """What is measured in a slice: ``side``, while all processes of the others are stopped."""

    side: Side
    stopped: Sequence[Side]


def alternate(slots: Sequence[Slot], *, slice_s: float, cycles: int) -> list[tuple[float, ...]]:
    """Ticks per second of each slot, cycle by cycle, every second one in the opposite order. All must be ticking."""
    rates = []
    for cycle in range(cycles):
        order = list(enumerate(slots))
        rate = {index: _rate(slot, slice_s) for index, slot in (order if cycle % 2 else order[::-1])}
        rates.append(tuple(rate[index] for index in range(len(slots))))
    return rates


def _rate(slot: Slot, slice_s: float) -> float:
    with contextlib.ExitStack() as stack:
        for other in slot.stopped:
            stack.enter_context(stopped(other))
        time.sleep(SETTLE_S)
        begin = _next_tick(slot.side)
        time.sleep(slice_s)
        end = _next_tick(slot.side)
    return (end.count - begin.count) / (end.at - begin.at)


def _next_tick(side: Side) -> Tick:
    """Wait for a tick, so that a slice begins and ends with a whole step."""
    wait_for_ticks(side, read(side.ticks).count + 1)
    return read(side.ticks)


def rates_by_round(rounds: Sequence[Sequence[tuple[float, ...]]]) -> list[list[float]]:
    """One rate per round for each slot: the geometric mean of that round's slices."""
    return [
        [geometric_mean(cycle[index] for cycle in cycles) for cycles in rounds]
        for index in range(len(rounds[0][0]))
    ]
