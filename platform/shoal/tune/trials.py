"""The trials of a running sweep: handing them out, booking what becomes of them, watching. No Ray here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from shoal.errors import ShoalError
from shoal.storage import create_json
from shoal.tracking import RunRecord
from shoal.tune.record import SweepRecord, Trial, TrialState, run_of, seen_in_journal
from shoal.tune.search import Search
from shoal.tune.trial import TrialPlan

HOPELESS_AFTER = 3
"""So many trials that failed with none that did better end a sweep: the next would fail too."""


class Trials:
    """Hands out a sweep's trials and books what becomes of them; safe to use from several threads.

    What an earlier driver left comes first: results that only the runs' journals know are booked, trials that
    were not done are handed out again.
    """

    def __init__(self, record: SweepRecord, plan: TrialPlan, search: Search, *, num_trials: int) -> None:
        self._record = record
        self._plan = plan
        self._search = search
        self._num_trials = num_trials
        self._changed = threading.Condition()
        self._is_stopping = False
        self._objective = plan.template.recipe.objective
        self._by_number = {trial.number: trial for trial in record.trials()}
        self._unfinished: list[int] = []
        for trial in list(self._by_number.values()):
            if not trial.state.is_final:
                trial = self._look(trial)
                trial = trial if trial.state.is_final else replace(trial, state=TrialState.STOPPED)
                self._put(trial)
            if trial.state.is_final:
                self._tell(trial)
            else:
                self._unfinished.append(trial.number)

    @property
    def num_trials(self) -> int:
        """How many trials the sweep is to have, those of earlier drivers included."""
        return max(self._num_trials, len(self._by_number))

    @property
    def num_left(self) -> int:
        """How many trials are still to be handed out, at most."""
        return len(self._unfinished) + max(0, self._num_trials - len(self._by_number))

    def snapshot(self) -> list[Trial]:
        """Every trial as it stands, by number."""
        with self._changed:
            return [self._by_number[number] for number in sorted(self._by_number)]

    def wait_changed(self, seen: list[Trial], timeout_s: float) -> list[Trial]:
        """Block until a trial differs from ``seen``, for at most ``timeout_s``; returns the trials."""

        def differs() -> bool:
            return [self._by_number[number] for number in sorted(self._by_number)] != seen

        with self._changed:
            self._changed.wait_for(differs, timeout_s)
        return self.snapshot()

    def next(self) -> Trial | None:
        """Claim the next trial's run; None when there is none left, or none worth it."""
        with self._changed:
            if self.is_stopping or self._is_hopeless():
                return None
            if self._unfinished:
                trial = self._by_number[self._unfinished.pop(0)]
                self._search.resume(trial.fields)
                trial = replace(trial, state=TrialState.WAITING)
            elif len(self._by_number) < self._num_trials and (fields := self._search.ask()) is not None:
                number = max(self._by_number, default=0) + 1
                trial = Trial(
                    number=number,
                    run=run_of(self._record.name, number),
                    fields=fields,
                    state=TrialState.WAITING,
                )
            else:
                return None
            run = self._run(trial)
            run.claim_identity(self._plan.spec(trial.number, trial.fields).identity())
            run.clear_stop()
            create_json(run.dir / "trial.json", {"sweep": self._record.name, "trial": trial.number})
            self._put(trial)
            return trial

    def started(self, number: int) -> None:
        """The trial has a process."""
        self._change(number, lambda trial: replace(trial, state=TrialState.RUNNING))

    def lost(self, number: int) -> None:
        """The trial's process died; another will go on with it."""
        self._change(number, lambda trial: replace(trial, state=TrialState.WAITING))

    def reported(self, number: int, step: int, value: float | None) -> None:
        """The trial measured its objective at a step."""

        def better(trial: Trial) -> Trial:
            is_better = value is not None and self._objective.is_better(value, trial.value)
            return replace(trial, step=step, value=value if is_better else trial.value)

        with self._changed:
            self._by_number[number] = better(self._by_number[number])
            self._changed.notify_all()

    def ended(self, number: int, *, was_pruned: bool = False, error: str = "") -> Trial:
        """The trial is over; book what its run's journal says. ``error``: why machines could not run it."""
        with self._changed:
            trial = self._look(self._by_number[number])
            if error and trial.state is not TrialState.FINISHED:
                trial = replace(trial, state=TrialState.FAILED, error=trial.error or error)
            elif was_pruned and trial.state is not TrialState.FAILED:
                trial = replace(trial, state=TrialState.PRUNED)
            elif trial.state is TrialState.RUNNING:
                trial = replace(trial, state=TrialState.STOPPED)
            self._put(trial)
            if trial.state.is_final:
                self._tell(trial)
            return trial

    def close(self) -> None:
        """Nobody works on trials any more: those that are not done are stopped, and may be gone on with."""
        for trial in self.snapshot():
            if trial.state in (TrialState.WAITING, TrialState.RUNNING):
                self.ended(trial.number)

    def stop(self) -> None:
        """Hand out no more, and ask every trial under way to stop at its next step boundary."""
        with self._changed:
            self._is_stopping = True
            for trial in self._by_number.values():
                if trial.state in (TrialState.WAITING, TrialState.RUNNING):
                    self._run(trial).mark_stop()
            self._changed.notify_all()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called, or another process asked for it (``shoal stop``)."""
        if not self._is_stopping and self._record.stop_requested():
            self.stop()
        return self._is_stopping

    @property
    def has_running(self) -> bool:
        """Whether a trial has a process."""
        return any(trial.state is TrialState.RUNNING for trial in self.snapshot())

    def evaluations(self) -> list[tuple[int, int, float]]:
        """(trial, step, objective) of every evaluation of trials that are done: what a scheduler missed."""
        metric = self._objective.metric
        return [
            (trial.number, event["step"], event["values"][metric])
            for trial in self.snapshot()
            if trial.state.is_final
            for event in self._run(trial).iter_events(("eval",))
            if event["split"] == "val" and metric in event["values"]
        ]

    def _is_hopeless(self) -> bool:
        done = [trial for trial in self._by_number.values() if trial.state.is_final]
        return len(done) >= HOPELESS_AFTER and all(trial.state is TrialState.FAILED for trial in done)

    def _run(self, trial: Trial) -> RunRecord:
        return RunRecord(self._record.storage, trial.run)

    def _look(self, trial: Trial) -> Trial:
        try:
            return seen_in_journal(trial, self._run(trial), self._objective)
        except ShoalError as err:  # a run whose files are damaged must not end the sweep
            return replace(trial, state=TrialState.FAILED, error=str(err))

    def _tell(self, trial: Trial) -> None:
        outcome = {TrialState.FINISHED: "finished", TrialState.PRUNED: "pruned"}.get(trial.state, "failed")
        self._search.tell(trial.fields, outcome, trial.value, step=trial.step)  # type: ignore[arg-type]

    def _change(self, number: int, change: Callable[[Trial], Trial]) -> None:
        with self._changed:
            self._put(change(self._by_number[number]))

    def _put(self, trial: Trial) -> None:
        with self._changed:
            self._by_number[trial.number] = trial
            self._record.book(trial)
            self._changed.notify_all()
