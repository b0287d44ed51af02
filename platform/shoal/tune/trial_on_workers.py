"""One trial on several workers: its evaluations, handed out one by one as its run's journal tells of them.

No Ray here. The workers are other processes, so unlike `trial.TrialRun`'s their training goes on while a
scheduler decides; where it decides to end the trial, they stop at their next step boundary and commit.
"""

from __future__ import annotations

import time
from collections import deque

from shoal.errors import EnvironmentFailure, WorkerLost
from shoal.tracking import RunRecord
from shoal.train.run import POLL_S, Driver
from shoal.train.spec import RunSpec
from shoal.tune.trial import STOP_TIMEOUT_S, Report, last_report


class TrialOnWorkers:
    """A trial whose ``driver`` has started. Call `next` until its report has ended, or `stop` it before that."""

    def __init__(self, spec: RunSpec, driver: Driver) -> None:
        self._spec = spec
        self._driver = driver
        self._objective = spec.recipe.objective
        self._record = RunRecord(spec.storage, spec.name)
        self._read_to = driver.begin()
        self._unread: deque[Report] = deque()
        self._step = 0

    def next(self) -> Report:
        """The next evaluation, or the end. Blocks until there is one; evaluations that were made meanwhile wait.

        Raises:
            EnvironmentFailure: machines failed; another driver goes on from the last checkpoint. Not for workers
                that died too often: these restarts are used up, and the run's record says so.
        """
        while True:
            # In this order: what a driver writes before it is gone must not be missed.
            is_over = not self._driver.is_alive()
            self._look()
            if self._unread:
                return self._unread.popleft()
            if is_over:
                return self._end()
            time.sleep(POLL_S)

    def stop(self) -> bool:
        """End the run at its next step boundary with a checkpoint, unless it has ended; True once it has.

        Blocks, for up to `STOP_TIMEOUT_S`; workers that are not done by then are killed.
        """
        if not self._driver.is_alive():
            return True
        self._driver.stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._driver.is_alive() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if self._driver.is_alive():
            self._driver.abort()
        self._record.clear_stop()  # ours; the run may be gone on with by name
        return not self._driver.is_alive()

    def _look(self) -> None:
        events, self._read_to = self._record.events_since(self._read_to)
        for event in events:
            if event["kind"] != "eval" or event["split"] != "val":
                continue
            # Workers that started again repeat the evaluations after their checkpoint. The last one is reported
            # when the run has ended, tests and checkpoints included.
            if self._step < event["step"] < self._spec.target_steps:
                self._step = event["step"]
                value = event["values"].get(self._objective.metric)
                self._unread.append(Report(step=self._step, value=value, has_ended=False))

    def _end(self) -> Report:
        failure = self._driver.failure()
        if isinstance(failure, EnvironmentFailure) and not isinstance(failure, WorkerLost):
            raise failure
        return last_report(self._record, self._objective)
