"""Kill or stop one rank of a run, and see from outside when its group takes the next step and where it goes on.

The ranks note their steps in a folder (`benchmarks.steps`); who runs them does not matter here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from benchmarks.steps import Steps, read

RANKS = (0, 1)
PROGRESS_STEPS = 300
PROGRESS_S = 8.0
"""How far a run must have come since its last recovery before the next of its ranks is harmed, by default."""
START_DEADLINE_S = 120.0
LOG = "log"
"""File beside the ranks' with all that the run printed, if it is there."""

T = TypeVar("T")


@dataclass(frozen=True)
class Recovery:
    """What one lost worker cost."""

    seconds: float
    """From the signal to the first step of the process in its place: a step has every rank's gradients in it."""
    steps_lost: int
    """Steps that every rank had completed and that were done again."""
    trained_s: float
    """From the first step since the last recovery, or since the start, to the signal."""
    steps: int
    """Steps that every rank completed meanwhile."""

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.steps_lost} step(s) lost"


class Victims:
    """The ranks of one run that notes its steps in ``folder``, to be harmed one after the other."""

    def __init__(self, folder: Path, *, progress_s: float | None = None) -> None:
        self._folder = folder
        self._progress_s = PROGRESS_S if progress_s is None else progress_s
        self._since: Steps | None = None

    def wait_for_progress(self) -> None:
        """Block until all ranks have gone on long enough since the start, or since the last recovery.

        Raises:
            SystemExit: they did not within `START_DEADLINE_S`; has the end of what the side printed.
        """
        if wait_for(self._has_progress, START_DEADLINE_S) is None:
            log = self._folder / LOG
            printed = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise SystemExit(f"no progress in {START_DEADLINE_S:g} s: {self._ranks()}\n{printed}")

    def harm(self, rank: int, number: int, deadline_s: float) -> Recovery | None:
        """Send a signal to a rank and wait until another process is that rank; None if none is in time.

        The rank must have noted a step.
        """
        old = read(self._folder, rank)
        assert old is not None, "wait_for_progress comes first"
        since = self._since or old
        process = psutil.Process(old.pid)
        begin = time.monotonic()
        process.send_signal(number)
        wait_for(lambda: has_ceased(process) or None, 5.0)
        completed = min(steps.last for steps in self._ranks() if steps is not None)
        new = wait_for(lambda: self._other_than(old.pid, rank), deadline_s)
        if new is None:
            return None
        self._since = new
        return Recovery(
            new.first_at - begin,
            max(0, completed - (new.first - 1)),
            trained_s=begin - since.first_at,
            steps=completed - since.first + 1,
        )

    def _ranks(self) -> list[Steps | None]:
        return [read(self._folder, rank) for rank in RANKS]

    def _has_progress(self) -> bool | None:
        ranks = [steps for steps in self._ranks() if steps is not None]
        if len(ranks) < len(RANKS):
            return None
        since = self._since or ranks[0]
        return (
            all(
                steps.last >= since.first + PROGRESS_STEPS
                and steps.last_at >= since.first_at + self._progress_s
                for steps in ranks
            )
            or None
        )

    def _other_than(self, pid: int, rank: int) -> Steps | None:
        steps = read(self._folder, rank)
        return steps if steps is not None and steps.pid != pid else None


def wait_for(look: Callable[[], T | None], deadline_s: float) -> T | None:
    """What ``look`` returns once that is not None; None if it never was in time."""
    deadline = time.monotonic() + deadline_s
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def has_ceased(process: psutil.Process) -> bool:
    """Whether a process is gone, dead or stopped: it completes no further step."""
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True
