"""A sweep's record on storage: who it is, and what became of its trials. Needs no cluster."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError, NotFoundError, RequestError, did_you_mean
from shoal.recipe import Objective
from shoal.storage import FileLock, StopMark, Storage, append_line, check_name, claim, read_lines
from shoal.tracking import RunRecord, RunState, read_identity
from shoal.train.spec import Source

_IDENTITY = "sweep.json"
_PARTS = {"objective", "space"}
"""Of ``sweep.json``, without which a sweep cannot be shown."""
MAX_TRIALS = 999
"""A trial's number has three digits in its run's name."""


class TrialState(StrEnum):
    """Where a trial stands."""

    WAITING = "waiting"
    """It is next, and waits for room on the cluster."""
    RUNNING = "running"
    FINISHED = "finished"
    """It ran all its steps."""
    PRUNED = "pruned"
    """The scheduler ended it early, because others were better."""
    FAILED = "failed"
    """Its recipe raised an error, or machines failed it more often than the sweep retries."""
    STOPPED = "stopped"
    """It was stopped, or its driver died, before it was done; the same command goes on with it."""

    @property
    def is_final(self) -> bool:
        """Whether the sweep never looks at the trial again."""
        return self in (TrialState.FINISHED, TrialState.PRUNED, TrialState.FAILED)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep, as far as it came."""

    number: int
    """From 1."""
    run: str
    """Name of its run: what ``register`` and ``shoal logs`` take."""
    fields: Mapping[str, Any]
    """What the sweep chose."""
    state: TrialState
    value: float | None = None
    """The best objective so far, on validation data; None before it was measured."""
    values: Mapping[str, float] = field(default_factory=dict)
    """All validation metrics at that step."""
    step: int = 0
    """The last step it is known to have reached."""
    error: str = ""
    """Why it failed, else empty."""
    source: Source | None = None
    """Of population-based training: the other trial's checkpoint from which it went on; None for a first one."""
    replaced_by: str = ""
    """Of population-based training: the run that took its place, else empty."""

    def to_line(self) -> str:
        """As one line of ``trials.jsonl``; what was measured as NaN or infinite is left out."""
        plain = asdict(self) | {"trial": self.number, "values": _finite(self.values)}
        for left_out in ("number", *(name for name in ("source", "replaced_by") if not plain[name])):
            del plain[left_out]
        if self.value is not None and not math.isfinite(self.value):
            plain["value"] = None
        return json.dumps(plain, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_line(cls, line: str) -> Trial | None:
        """The trial of such a line; None when it is damaged."""
        try:
            plain = json.loads(line)
            number = int(plain.pop("trial"))
            source = Source(**plain.pop("source")) if "source" in plain else None
            trial = cls(number=number, state=TrialState(plain.pop("state")), source=source, **plain)
            return trial if trial._is_well_formed() else None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, RequestError):
            return None

    def _is_well_formed(self) -> bool:
        """Whether every part has its type, which a damaged line need not. Raises RequestError for a run's name."""
        check_name("run", self.run)
        numbers = [*self.values.values(), *([] if self.value is None else [self.value])]
        return (
            1 <= self.number <= MAX_TRIALS
            and isinstance(self.fields, dict)
            and all(isinstance(number, int | float) for number in numbers)
            and isinstance(self.step, int)
            and isinstance(self.error, str)
            and isinstance(self.replaced_by, str)
        )


class SweepRecord:
    """The record of one sweep under ``<storage>/sweeps/<name>``. Cheap to make; reads when asked.

    Raises:
        RequestError: a name that cannot name a run, or is too long to be the beginning of one.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        check_name("sweep", name)
        check_name("run", run_of(name, MAX_TRIALS))
        self.storage = storage
        self.name = name
        self.dir: Path = storage.sweep_dir(name)
        self.trials_path = self.dir / "trials.jsonl"
        self.lock = FileLock(self.dir / "lock")
        self._identity_path = self.dir / _IDENTITY
        self._stop = StopMark(self.dir)

    def __repr__(self) -> str:
        return f"SweepRecord({self.name!r})"

    @staticmethod
    def exists(storage: Storage, name: str) -> bool:
        """Whether there is such a sweep; a name that no sweep can have is that of none."""
        try:
            return SweepRecord(storage, name)._identity_path.exists()
        except RequestError:
            return False

    def claim(self, identity: Mapping[str, Any]) -> bool:
        """Give the name to this search: True if it was free, False if it already is this very search.

        Raises:
            IdentityError: the name belongs to another search; the message shows every difference.
            CorruptError, StorageError: what is recorded cannot be read, or it cannot be written.
        """
        if self._identity_path.exists():
            self.identity()  # says what is damaged, where a comparison would only say what differs
        return claim(
            self._identity_path,
            identity,
            what=f"sweep {self.name!r}",
            advice="Ask for what it has to go on with it; leave the name out, or choose a free one",
        )

    def identity(self) -> dict[str, Any]:
        """What the sweep was asked for.

        Raises:
            NotFoundError: there is no such sweep; the message lists those that exist.
            CorruptError: the file is damaged.
        """
        if not self._identity_path.exists():
            there = sweep_names(self.storage)
            raise NotFoundError(
                f"no sweep {self.name!r}; there are: {', '.join(there) or 'none'}{did_you_mean(self.name, there)}"
            )
        identity = read_identity(self._identity_path)
        if missing := _PARTS - identity.keys():
            raise CorruptError(
                f"{self._identity_path} is damaged: it has no {', '.join(sorted(missing))}. Restore it from a copy, "
                f"or move {self.dir} away and search under another name"
            )
        return identity

    def mark_stop(self) -> None:
        """Ask whoever drives the sweep to stop it, from any process. Repeating it is safe.

        Raises:
            NotFoundError: there is no such sweep.
        """
        self._stop.set()

    def stop_requested(self) -> bool:
        """Whether someone asked the sweep to stop since ``clear_stop``."""
        return self._stop.is_set()

    def clear_stop(self) -> None:
        """Forget an earlier request to stop: for the command that goes on with the sweep."""
        self._stop.clear()

    def book(self, trial: Trial) -> None:
        """Write down where a trial stands; a later line of the same trial replaces the earlier."""
        append_line(self.trials_path, trial.to_line(), sync=trial.state.is_final)

    def trials(self) -> list[Trial]:
        """Every trial, by number, as last booked."""
        found = [trial for line in read_lines(self.trials_path) if (trial := Trial.from_line(line))]
        latest = {trial.number: trial for trial in found}
        return [latest[number] for number in sorted(latest)]


def sweep_names(storage: Storage) -> list[str]:
    """The names of all sweeps on ``storage``."""
    return sorted(path.parent.name for path in storage.sweeps_dir.glob(f"*/{_IDENTITY}"))


def pruned_runs(storage: Storage) -> frozenset[str]:
    """The runs of all trials that their sweeps' schedulers ended early. Reads every sweep's record."""
    return frozenset(
        trial.run
        for name in sweep_names(storage)
        for trial in SweepRecord(storage, name).trials()
        if trial.state is TrialState.PRUNED
    )


def state_word(run: RunRecord, pruned: Container[str]) -> str:
    """Where a run stands, in the word that a person reads: the run's state, but ``pruned`` as its sweep says.

    The run itself only knows that it was stopped. One that somebody went on with to its end is ``finished``.
    ``pruned`` is what `pruned_runs` found.
    """
    state = run.state()
    if run.name in pruned and state in (RunState.STOPPED, RunState.INTERRUPTED):
        return str(TrialState.PRUNED)
    return str(state)


def best_trial(trials: Iterable[Trial], objective: Objective) -> Trial | None:
    """The best by ``objective`` of the trials that are done, else of all; the earliest among equals.

    None when no trial has measured it. One that failed is never the best.
    """
    measured = [trial for trial in trials if trial.value is not None and trial.state is not TrialState.FAILED]
    best: Trial | None = None
    for trial in [trial for trial in measured if trial.state.is_final] or measured:
        if trial.value is not None and objective.is_better(trial.value, best.value if best else None):
            best = trial
    return best


def run_of(sweep: str, number: int) -> str:
    """The name of a trial's run."""
    return f"{sweep}-t{number:03d}"


def seen_in_journal(trial: Trial, run: RunRecord, objective: Objective) -> Trial:
    """The trial with what its run's own journal says: state, step, best objective.

    The journal is what a trial's process wrote itself, so nothing is lost when the sweep's driver dies.
    """
    best = run.best(objective)
    values = dict(best["values"]) if best else {}
    summary = run.summary()
    trial = replace(trial, step=summary.step, values=values, value=values.get(objective.metric))
    match run.state():
        case RunState.FINISHED:
            return replace(trial, state=TrialState.FINISHED)
        case RunState.FAILED:
            error = str(summary.ended["error"]) if summary.ended else ""
            return replace(trial, state=TrialState.FAILED, error=error)
        case RunState.RUNNING:
            return replace(trial, state=TrialState.RUNNING)
    return replace(trial, state=TrialState.STOPPED)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
