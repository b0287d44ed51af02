"""One trial in the process that Tune gave it: the engine in a thread, its evaluations handed out one by one.

No Ray here. The training waits at each evaluation until the next one is asked for, so a scheduler decides on
a trial that stands still; a trial that is ended early stops at its next step boundary, commits, and says so
in its journal, like any run that is stopped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.capacity import Resources
from shoal.recipe import Objective
from shoal.recipe import replace as replace_fields
from shoal.tracking import RunRecord
from shoal.train.spec import EvalListener, RunSpec, Source
from shoal.tune.record import run_of

STOP_TIMEOUT_S = 120.0
"""How long a trial that is ended early may take to its next step boundary and to commit."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What all trials of a sweep have in common. Travels to their processes."""

    sweep: str
    template: RunSpec
    """A trial's run but for its name and the fields that the sweep chooses."""
    workers: int = 1
    """Of each trial. One trains in the trial's own process; several are processes besides it."""
    resources_per_worker: Resources = field(default_factory=lambda: {"CPU": 1.0})
    retries: int = 0
    """How often a trial whose process dies is started again; of several workers, how often one is replaced."""

    def spec(self, number: int, fields: Mapping[str, Any], source: Source | None = None) -> RunSpec:
        """The run of one trial; ``source``: the checkpoint of another that it goes on from.

        Raises:
            RecipeError: the recipe does not take these fields together.
        """
        recipe = replace_fields(self.template.recipe, **fields)
        return replace(self.template, recipe=recipe, name=run_of(self.sweep, number), source=source)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial says at an evaluation, and once more when its run has ended."""

    step: int
    value: float | None
    """The objective at this step; None when it was not measured."""
    has_ended: bool


def last_report(record: RunRecord, objective: Objective) -> Report:
    """What the trial of a run that is over says last."""
    last = record.last_eval("val") or {}
    return Report(step=record.step, value=last.get(objective.metric), has_ended=True)


Train = Callable[[RunSpec, EvalListener], None]
"""Trains a run to its end, calling back at every evaluation; the engine, or a test's stand-in."""


def train_here(spec: RunSpec, on_eval: EvalListener) -> None:
    """Train in this process, alone."""
    from shoal.train.engine import train_worker
    from shoal.train.group import Group

    train_worker(spec, Group.alone(), on_eval=on_eval)


class TrialRun:
    """A trial under way. Call `next` until its report has ended, or `stop` it before that."""

    def __init__(self, spec: RunSpec, *, train: Train = train_here) -> None:
        self._spec = spec
        self._train = train
        self._objective = spec.recipe.objective
        self._record = RunRecord(spec.storage, spec.name)
        self._reports: queue.Queue[Report | Exception] = queue.Queue()
        self._go_on = threading.Semaphore(0)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"shoal-{spec.name}", daemon=True)

    def next(self) -> Report:
        """Train to the next evaluation, or to the end. Blocks.

        Raises:
            EnvironmentFailure: machines failed; a new `TrialRun` goes on from the last checkpoint.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go_on.release()
        report = self._reports.get()
        if isinstance(report, Exception):
            raise report
        return report

    def stop(self) -> bool:
        """End the run at its next step boundary with a checkpoint, unless it has ended; True once it has.

        Blocks, for up to `STOP_TIMEOUT_S`.
        """
        if self._thread.ident is None or not self._thread.is_alive():
            return True
        self._is_stopping = True
        self._record.mark_stop()
        self._go_on.release()
        self._thread.join(STOP_TIMEOUT_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._train(self._spec, self._on_eval)
            if self._is_stopping:
                self._record.clear_stop()  # ours; the run may be gone on with by name
            self._reports.put(last_report(self._record, self._objective))
        except Exception as err:  # `next` raises it
            self._reports.put(err)

    def _on_eval(self, step: int, values: Mapping[str, float]) -> None:
        if self._is_stopping or step >= self._spec.target_steps:
            return  # the last evaluation is reported when the run has ended, tests and checkpoints included
        self._reports.put(Report(step=step, value=values.get(self._objective.metric), has_ended=False))
        self._go_on.acquire()
