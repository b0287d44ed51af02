"""When what happens between steps is due. Decides only; the clock comes from outside."""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.train.budget import Budget

STOP_POLL_S = 0.25
"""How often rank 0 looks whether the run is asked to stop or to resize."""
NUM_METRIC_LINES = 200
"""About how many lines of training metrics a run writes."""
MAX_METRIC_GAP_S = 2.0
"""The longest the record stays silent between steps that are shorter than that."""


class Cadence:
    """What is due on rank 0 at a step boundary. Each ``is_..._due`` only asks; whoever acts on it says so after.

    ``clock`` gives seconds that never go back; every wait begins when the cadence is made.
    """

    def __init__(
        self,
        *,
        target_steps: int,
        checkpoint_every_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``checkpoint_every_s`` None: as often as a `Budget` allows."""
        self._metric_steps = max(1, target_steps // NUM_METRIC_LINES)
        self._checkpoint_every_s = checkpoint_every_s
        self._budget = Budget() if checkpoint_every_s is None else None
        self._save_began = 0.0
        self._step_began: float | None = None
        self._is_beside_write = False
        self._clock = clock
        self._last_checkpoint = self._last_look = self._last_line = clock()

    def is_checkpoint_due(self) -> bool:
        """Whether the newest checkpoint is as old as it may become."""
        every_s = self._checkpoint_every_s if self._budget is None else self._budget.interval_s
        return self._clock() - self._last_checkpoint >= (every_s or 0.0)

    def checkpoint_begins(self) -> None:
        """From now on training waits for the checkpoint, until `checkpoint_taken`."""
        self._save_began = self._clock()

    def checkpoint_taken(self) -> None:
        """The next checkpoint is due a whole interval from now."""
        self._last_checkpoint = self._clock()
        if self._budget is not None:
            self._budget.paused(self._last_checkpoint - self._save_began)

    def step_begins(self, *, is_writing: bool) -> None:
        """A step boundary is left; ``is_writing``: beside the step a checkpoint is copied or written."""
        if self._budget is not None:
            self._step_began, self._is_beside_write = self._clock(), is_writing

    def step_ended(self) -> None:
        """A step boundary is reached."""
        if self._budget is not None and self._step_began is not None:
            self._budget.stepped(self._clock() - self._step_began, is_writing=self._is_beside_write)

    def is_look_due(self) -> bool:
        """Whether to look if the run is asked to stop or to resize: a look at the disk, too much for every step."""
        return self._clock() - self._last_look >= STOP_POLL_S

    def looked(self) -> None:
        """The next look is due `STOP_POLL_S` from now."""
        self._last_look = self._clock()

    def is_line_due(self, step: int) -> bool:
        """Whether a line of training metrics is due after ``step`` steps."""
        return step % self._metric_steps == 0 or self._clock() - self._last_line > MAX_METRIC_GAP_S

    def line_written(self) -> None:
        """Silence is counted from now."""
        self._last_line = self._clock()
