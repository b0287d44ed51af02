"""The trials of a running sweep: handing them out, booking what becomes of them, watching. No Ray here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shoal.errors import RecipeError, ShoalError
from shoal.tracking import RunRecord
from shoal.train.adopt import adopt_checkpoint, discard_leftovers
from shoal.tune.population import perturb
from shoal.tune.record import MAX_TRIALS, SweepRecord, Trial, TrialState, run_of, seen_in_journal
from shoal.tune.search import Search
from shoal.tune.trial import TrialPlan

HOPELESS_AFTER = 3
"""So many trials that failed, with none that did better or still may, end a sweep: the next would fail too."""
_MAX_REDRAWS = 10
"""How often changed fields that do not go together are drawn anew."""


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
        runs = {trial.run for trial in self._by_number.values()}
        for trial in list(self._by_number.values()):
            if trial.replaced_by and trial.replaced_by not in runs:  # the driver died in between
                trial = replace(trial, replaced_by="", state=TrialState.STOPPED)
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
        """How many trials the sweep is to have, those of earlier drivers and those that replaced others included."""
        return max(self._num_trials, self._num_first) + len(self._by_number) - self._num_first

    @property
    def num_left(self) -> int:
        """How many trials are still to be handed out, at most; those that replace others come on top."""
        return len(self._unfinished) + max(0, self._num_trials - self._num_first)

    @property
    def _num_first(self) -> int:
        """How many trials the sampler suggested: all but those that replaced others."""
        return sum(trial.source is None for trial in self._by_number.values())

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
                if trial.source is None:
                    self._search.resume(trial.fields)
                trial = replace(trial, state=TrialState.WAITING)
            elif self._num_first < self._num_trials and (fields := self._search.ask()) is not None:
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
            if trial.source is None:
                discard_leftovers(run)
            run.claim_identity(self._plan.spec(trial.number, trial.fields, trial.source).identity())
            run.clear_stop()
            run.claim_trial(self._record.name, trial.number)
            self._put(trial)
            return trial

    def exploit(self, loser: int, winner: int) -> Trial | None:
        """Replace a trial by one that goes on from another's newest checkpoint with fields near its own.

        The new trial is the next to be handed out; the loser is booked as pruned, and its caller must end it.
        None, and nothing changes, when the sweep is stopping or has no number left. Blocks while the
        checkpoint is copied. For one thread, the one that calls `next`.

        Raises:
            StorageError: the copy cannot be written.
            NotFoundError: the winner has no checkpoint that verifies.
        """
        number = max(self._by_number) + 1
        while number <= MAX_TRIALS and self._run_of(number).identity() is not None:
            number += 1  # somebody's own run has this trial's name: adopting would delete its checkpoints
        if self.is_stopping or number > MAX_TRIALS:
            return None
        run = self._run_of(number)
        source = adopt_checkpoint(self._run(self._by_number[winner]), run)
        trial = Trial(
            number=number,
            run=run.name,
            fields=self._near(self._by_number[winner].fields, number),
            state=TrialState.WAITING,
            step=source.step,
            source=source,
        )
        with self._changed:
            # In this order: a loser whose successor was never booked is gone on with by the next driver.
            was = self._look(self._by_number[loser])
            self._put(replace(was, state=TrialState.PRUNED, replaced_by=run.name))
            self._put(trial)
            self._unfinished.append(number)
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

    def _near(self, fields: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """``fields`` changed a little; as they are, where nothing near them is taken by the recipe."""
        for redraw in range(_MAX_REDRAWS):
            seed = f"{self._plan.template.seed}/{number}/{redraw}"
            near = perturb(fields, self._search.space, seed=seed)
            try:
                self._plan.spec(number, near)
            except RecipeError:  # the recipe's own checks refuse these together: draw others
                continue
            return near
        return fields

    def _is_hopeless(self) -> bool:
        states = [trial.state for trial in self._by_number.values()]
        done = [state for state in states if state.is_final]
        # One that runs may do better: it counts against a failure.
        num_running = sum(state is TrialState.RUNNING for state in states)
        return len(done) >= HOPELESS_AFTER + num_running and set(done) == {TrialState.FAILED}

    def _run(self, trial: Trial) -> RunRecord:
        return RunRecord(self._record.storage, trial.run)

    def _run_of(self, number: int) -> RunRecord:
        return RunRecord(self._record.storage, run_of(self._record.name, number))

    def _look(self, trial: Trial) -> Trial:
        try:
            return seen_in_journal(trial, self._run(trial), self._objective)
        except ShoalError as err:  # a run whose files are damaged must not end the sweep
            return replace(trial, state=TrialState.FAILED, error=str(err))

    def _tell(self, trial: Trial) -> None:
        if trial.source is not None:
            return  # how well it did is not due to its fields alone, and the sampler did not suggest them
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
