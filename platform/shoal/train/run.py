"""A handle on a run: what it is doing, how it went, how to stop it. Works anywhere: it reads and marks the record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shoal.errors import (
    DeadlineExceeded,
    EnvironmentFailure,
    NotFoundError,
    ShoalError,
    SupersededError,
    did_you_mean,
    from_name,
)
from shoal.recipe import Objective
from shoal.storage import Storage
from shoal.tracking import Event, RunRecord, RunState, list_runs
from shoal.train.output import log_path
from shoal.train.progress import Reporter, reporter

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from shoal.config import Range
    from shoal.train.timeline import RunTimeline

POLL_S = 0.1
"""How often a wait looks at the record."""

_MAX_NAMED = 8
"""Runs that a message names: the newest."""


class Driver(Protocol):
    """Whoever keeps the run's workers alive; lives in the process that started the run."""

    def is_alive(self) -> bool: ...
    def failure(self) -> BaseException | None:
        """Why the driver gave up, once it has."""
        ...

    def waits_for(self) -> str:
        """What keeps the run from starting, as in ``room for 2 workers``; for a display."""
        ...

    def begin(self) -> int:
        """Where the journal ended when the driver began: older lines are of earlier attempts."""
        ...

    def stop(self) -> None:
        """Stop the run at its next step boundary, or at once if it has not started."""
        ...

    def abort(self) -> None:
        """End the workers at once; what was committed stays."""
        ...


class Run:
    """One training of one recipe."""

    def __init__(self, record: RunRecord, *, driver: Driver | None = None, note: str = "") -> None:
        self._record = record
        self._driver = driver
        self.note = note
        """Anything the user should know about how the run was started; empty if nothing."""

    @property
    def name(self) -> str:
        """The run's name; the same command finds the same run."""
        return self._record.name

    @property
    def record(self) -> RunRecord:
        """The run's files."""
        return self._record

    @property
    def state(self) -> RunState:
        """Where the run stands now."""
        if self._driver is not None and self._driver.is_alive():
            return RunState.RUNNING
        return self._record.state()

    @property
    def step(self) -> int:
        """Steps done."""
        return self._record.step

    @property
    def workers(self) -> int | None:
        """How many workers train it, or did last; None before it was ever started."""
        return self._record.summary().workers

    @property
    def objective(self) -> Objective | None:
        """What "best" means for this run; None before it has an identity."""
        return objective_of(self._record)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers of the last attempt, by rank (on the machines they run on)."""
        starts = self._record.events(("start",))
        return list(starts[-1]["pids"]) if starts else []

    def metrics(self) -> pd.DataFrame:
        """Everything measured, indexed by step; validation and test columns begin with val_ and test_."""
        return self._record.metrics_frame()

    def best_checkpoint(self) -> Path:
        """The folder of the best committed checkpoint by the recipe's objective, else of the newest.

        Raises:
            NotFoundError: the run has committed none yet.
        """
        objective = self.objective
        best = self._record.best_checkpoint(objective) if objective else None
        chosen = [best] if best else self._record.checkpoints()[-1:]
        if chosen:
            return Path(self._record.dir / chosen[0]["path"])
        raise NotFoundError(
            f"run {self.name!r} has no checkpoint yet (state: {self.state}, step {self.step}); "
            "let it run until its first commit, then register it"
        )

    def stop(self) -> None:
        """Ask the run to commit and stop at the next step boundary. Does not block; safe to repeat."""
        if self._driver is not None and self._driver.is_alive():
            self._driver.stop()
        else:
            self._record.mark_stop()

    def resize(self, workers: int | str | Range) -> None:
        """Ask for another number of workers, ``2`` or of a range ``"1..4"`` as many as are free; does not block.

        As soon as there is room the run commits at a step boundary and goes on from it with so many: no step is lost,
        and batches, their order and the schedule stay what they were. Any process may ask; a new start of the run
        says its own number.

        Raises:
            RequestError: not 1 or more; more than the run can ever have, or than fit into the cluster that this
                process is attached to; the run is not being trained, or by a fixed number (`torchrun`, a trial).
            StorageError: storage is full or not writable.
        """
        from shoal.train.resize import resize

        resize(self._record, workers)

    def abort(self) -> None:
        """End the workers at once; the run goes on from its last commit when it is started again."""
        if self._driver is not None:
            self._driver.abort()

    def logs(self, rank: int = 0) -> str:
        """What a rank has printed so far, tracebacks too; empty if it never started."""
        path = log_path(self._record.logs_dir, rank)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, *, timeout_s: float | None = None, progress: bool = True) -> Run:
        """Block until the run ends, showing how far it is; returns the run.

        Ctrl-C asks the run to commit and stop, and waits for that; a second Ctrl-C ends it at once.

        Raises:
            RecipeError: the recipe's own code failed; its traceback is in ``traceback_text``.
            EnvironmentFailure: the machines failed more often than the run retries.
            DeadlineExceeded: ``timeout_s`` seconds passed; the run goes on.
        """
        driver = self._driver
        with reporter(
            self._record,
            enabled=progress,
            last_line=lambda: outcome_text(self),
            since=driver.begin() if driver is not None else 0,
            waits_for=driver.waits_for if driver is not None else None,
        ) as report:
            try:
                self._wait(report, timeout_s)
            except KeyboardInterrupt:
                report.say("stopping at the next step boundary, with a checkpoint (Ctrl-C again: at once)")
                self.stop()
                try:
                    self._wait(report, None)
                except KeyboardInterrupt:
                    self.abort()
                raise
        self._raise_failure()
        return self

    def _wait(self, report: Reporter, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.is_active:
            report.update()
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"run {self.name!r} did not end within {timeout_s:g} s (state {self.state}, step {self.step}); "
                    "it goes on"
                )
            time.sleep(POLL_S)
        report.update()

    @property
    def is_active(self) -> bool:
        """True while somebody works on the run."""
        if self._driver is not None:
            return self._driver.is_alive()
        return self.state == RunState.RUNNING

    def _raise_failure(self) -> None:
        begin = self._driver.begin() if self._driver is not None else 0
        failure = self._driver.failure() if self._driver is not None else None
        if isinstance(failure, SupersededError):
            raise failure  # what the record says is of the driver that took over
        end = self._record.events(("end",), since=begin)[-1:]
        if end and end[0]["state"] == "failed":
            raise self._recorded_failure(end[0])
        if failure is not None:
            raise failure
        if self.state == RunState.INTERRUPTED:
            raise EnvironmentFailure(
                f"run {self.name!r} was interrupted at step {self.step}: its processes are gone. "
                "Start it again with the same command; it goes on from its last commit"
            )

    def _recorded_failure(self, end: Event) -> ShoalError:
        message = f"run {self.name!r} failed at step {end['step']}: {end['error']}"
        kind, text = str(end.get("error_type")), str(end.get("traceback", ""))
        if text:
            message += f"\n  full text: shoal logs {self.name}"
        return from_name(kind, message, traceback_text=text)

    def plot(self, *names: str) -> Figure:
        """Curves of the named metrics (default: losses, and the objective) over steps."""
        from shoal.train.plots import plot_run

        return plot_run(self.name, self.metrics(), names, self.objective)

    def timeline(self) -> RunTimeline:
        """Everything that happened to the run with its moment and duration, and its goodput; as of now.

        Reads the whole record; a copy that does not change. ``.frame()`` and ``.plot()`` show it.
        """
        from shoal.train.timeline import read_timeline

        return read_timeline(self._record)

    def __repr__(self) -> str:
        target = self._record.target_steps
        return f"Run({self.name!r}, {self.state}, step {self.step}{f' of {target}' if target else ''})"

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self._facts())
        return f"<table>{rows}</table>"

    def _facts(self) -> Iterator[tuple[str, str]]:
        target = self._record.target_steps
        yield "run", self.name
        yield "state", str(self.state)
        yield "step", f"{self.step:,} of {target:,}" if target else f"{self.step:,}"
        for split in ("val", "test"):
            for name, value in (self._record.last_eval(split) or {}).items():
                yield f"{split} {name}", f"{value:.4g}"
        if best := best_text(self._record):
            yield "best", best


def objective_of(record: RunRecord) -> Objective | None:
    """The objective a run was started with, from its identity."""
    identity: dict[str, Any] | None = record.identity()
    if identity is None or "objective" not in identity:
        return None
    return Objective(**identity["objective"])


def outcome_text(run: Run) -> str:
    """One line on how far the run came, its best value, and what goes on with it if it is not finished."""
    record, state = run.record, run.state
    target = record.target_steps
    how = "not started" if state is RunState.NEW else str(state)
    parts = [f"run {run.name}: {how} at step {run.step:,}{f' of {target:,}' if target else ''}"]
    if best := best_text(record):
        parts.append(f"best {best}")
    if run.is_active:
        parts.append("it goes on")
    elif state not in (RunState.FINISHED, RunState.FAILED):
        parts.append(where_it_goes_on(record))
    return "; ".join(parts)


def best_text(record: RunRecord) -> str:
    """The best value of the objective on validation data and its step: ``val accuracy 0.9767 at step 1,200``.

    Empty before it was measured.
    """
    objective = objective_of(record)
    best = record.best(objective) if objective is not None else None
    if objective is None or best is None:
        return ""
    return f"val {objective.metric} {best['values'][objective.metric]:.4g} at step {best['step']:,}"


def where_it_goes_on(record: RunRecord) -> str:
    """What the same command does with a run that is not finished."""
    commits = record.events(("checkpoint",))
    if not commits:
        return "nothing was committed yet; the same command starts it"
    return f"the same command goes on from step {commits[-1]['step']:,}, which is committed"


def find_run(storage: Storage, name: str) -> Run:
    """A handle on an existing run, with or without a cluster.

    Raises:
        NotFoundError: there is none of this name; lists those that exist.
    """
    record = RunRecord(storage, name)
    if record.identity() is None:
        known = [other.name for other in list_runs(storage)]
        there = ", ".join(known[:_MAX_NAMED]) or "none yet"
        if len(known) > _MAX_NAMED:
            there += f" and {len(known) - _MAX_NAMED} more"
        raise NotFoundError(f"there is no run {name!r}; there are: {there}{did_you_mean(name, known)}")
    return Run(record)
