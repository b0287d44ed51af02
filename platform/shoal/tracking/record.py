"""A run's record on storage: who it is, what happened to it, where it stands. Needs no cluster, no MLflow."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import (
    CorruptError,
    EnvironmentFailure,
    InternalError,
    RequestError,
    ShoalError,
    StorageError,
)
from shoal.recipe import Objective
from shoal.storage import (
    MAX_LINE_BYTES,
    DiskStore,
    Fence,
    FileLock,
    StopMark,
    Storage,
    append_line,
    check_name,
    claim,
    create_json,
    is_name,
    open_plain,
    read_json,
)
from shoal.tracking.journal import (
    Event,
    JournalSummary,
    RunState,
    best_by,
    encode,
    metrics_frame,
    parse,
)
from shoal.tracking.resizing import Resizing

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_IDENTITY = "identity.json"
_CHUNK_BYTES = 1 << 20
_CANCELLED = b"\x18"
"""Ends a line that its writer did not finish before it was killed; see `shoal.storage.journal`."""


class RunRecord:
    """The record of one run under ``<storage>/runs/<name>``.

    Cheap to make; touches the disk only when asked. Several processes may hold a record of the same run: one
    writes, any number read. May be shared by threads and sent to other processes.

    Raises:
        RequestError: a name that is not 1 to 80 of ``a-z 0-9 . _ -``, beginning with a letter or digit.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = check_name("run", name)
        self._storage = storage
        self._clock = clock
        self._guard: Callable[[], None] | None = None
        self.dir: Path = storage.run_dir(name)
        self.journal_path = self.dir / "journal.jsonl"
        self.checkpoints_dir = self.dir / "checkpoints"
        self.logs_dir = self.dir / "logs"
        self.lock_path = self.dir / "lock"
        """Held by rank 0 while it trains."""
        self.driver_lock_path = self.dir / "driver.lock"
        """Held by the process that keeps the workers alive: also while they start, or start again."""
        self.identity_path = self.dir / _IDENTITY
        self.fence = Fence(DiskStore(self.dir / "fence"))
        """Whoever trains the run takes a token of it first."""
        self._trial_path = self.dir / "trial.json"
        self._stop = StopMark(self.dir)
        self.resizing = Resizing(self.dir)
        """How many workers the run should have."""
        self._folding = threading.Lock()
        self._folded = JournalSummary()
        self._offset = 0

    def __repr__(self) -> str:
        return f"RunRecord({self.name!r})"

    def __reduce__(self) -> Any:
        return _guarded, (self._storage, self.name, self._guard)

    def guard_with(self, guard: Callable[[], None]) -> None:
        """Ask ``guard`` before every line: it raises when the right to write was lost. Pickled with the record."""
        self._guard = guard

    @staticmethod
    def exists(storage: Storage, name: str) -> bool:
        """Whether there is such a run; a name that no run can have is that of none."""
        return is_name(name) and RunRecord(storage, name).identity_path.exists()

    def identity(self) -> dict[str, Any] | None:
        """What the run was first asked for, or ``None`` for a run that does not exist.

        Raises:
            CorruptError: the file is damaged.
        """
        if not self.identity_path.exists():
            return None
        return read_identity(self.identity_path)

    def claim_identity(self, identity: Mapping[str, Any]) -> bool:
        """Give the name to this identity, once and for all: True if it was free, False if it already is its.

        Of several processes that claim a free name at once exactly one gets True.

        Raises:
            IdentityError: the name belongs to another identity; the message shows every difference.
            CorruptError: what is recorded cannot be read.
            StorageError: it cannot be written.
        """
        return claim(
            self.identity_path,
            identity,
            what=f"run {self.name!r}",
            advice="To go on with that run, ask for the values it has; to start another, leave the name out "
            "or choose a free one (name=..., or --name on the shell).",
        )

    def claim_trial(self, sweep: str, number: int) -> None:
        """Note which trial of which sweep the run is. Repeating it is safe.

        Raises:
            StorageError: it cannot be written.
        """
        create_json(self._trial_path, {"sweep": sweep, "trial": number})

    def trial(self) -> tuple[str, int] | None:
        """Name of the sweep and number of the trial that the run is, or ``None`` for a run that is none.

        Raises:
            CorruptError: the file is damaged.
        """
        if not self._trial_path.exists():
            return None
        found = read_json(self._trial_path)
        try:
            return str(found["sweep"]), int(found["trial"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{self._trial_path} is damaged: it names no trial") from error

    def append(self, kind: str, **fields: Any) -> None:
        """Write one line to the journal; ``t`` and ``attempt`` are added, and ``start`` begins a new attempt.

        Raises:
            SupersededError: from the guard, if there is one.
            StorageError: it cannot be written.
            InternalError: not a line that the journal knows.
        """
        if self._guard is not None:
            self._guard()
        attempt = max(1, self.attempt + (kind == "start"))
        self._write(kind, encode(kind, t=self._clock(), attempt=attempt, fields=fields))

    def _write(self, kind: str, line: str) -> None:
        append_line(self.journal_path, line)

    def note(self, kind: str, **fields: Any) -> None:
        """The same as `append` for a line that only tells a person when something happened: a full disk costs no
        more than the line, with a warning in the log.

        Raises:
            InternalError: not a line that the journal knows.
        """
        try:
            self.append(kind, **fields)
        except StorageError:
            logger.warning("run %s: its record lacks a line %r", self.name, kind, exc_info=True)

    def append_end(
        self,
        state: RunState,
        *,
        step: int,
        failure: BaseException | None = None,
        unknown: type[ShoalError] = InternalError,
    ) -> None:
        """Write an attempt's last line: how it ended, and of one that ``failed`` why.

        ``unknown`` is what a failure counts as that is not of `shoal.errors`: a `RecipeError` where the recipe's
        code runs.

        Raises:
            StorageError: it cannot be written.
            InternalError: a state that ends nothing.
        """
        error, kind, text = "", "", ""
        if isinstance(failure, ShoalError):
            error, kind = str(failure), type(failure).__name__
        elif failure is not None:
            error, kind = f"{type(failure).__name__}: {failure}", unknown.__name__
        says_all = isinstance(failure, EnvironmentFailure) or (
            isinstance(failure, ShoalError) and failure.__cause__ is None
        )
        if failure is not None and not says_all:
            text = "".join(traceback.format_exception(failure))
        self.append("end", step=step, state=state, error=error, error_type=kind, traceback=text)

    def events(self, kinds: Collection[str] | None = None, *, since: int = 0) -> list[Event]:
        """Every line of the journal from byte ``since``, or those of the given kinds; empty if there is none.

        Lines that cannot be read (a machine that crashed) are left out, with a warning in the log.
        """
        return list(self.iter_events(kinds, since=since))

    def iter_events(self, kinds: Collection[str] | None = None, *, since: int = 0) -> Iterator[Event]:
        """The same as ``events``, without holding them all in memory."""
        offset = since
        while True:
            events, end = self.events_since(offset)
            yield from (event for event in events if kinds is None or event["kind"] in kinds)
            if end <= offset:
                return
            offset = end

    def events_since(self, offset: int) -> tuple[list[Event], int]:
        """The next lines from byte ``offset``, and where to go on; at most about a megabyte of them.

        An unfinished last line waits for its end: the offset that comes back is always a line's beginning.
        Nothing new gives ``([], offset)``. An offset past the end (the run was deleted and made anew) starts
        over. What is longer than any line of a journal is passed over.

        Raises:
            CorruptError: the journal is no plain file.
        """
        try:
            with open_plain(self.journal_path) as file:
                size = file.seek(0, 2)
                start = offset if offset <= size else 0
                file.seek(start)
                data = file.read(_CHUNK_BYTES)
                if not data.endswith(b"\n"):
                    data += file.readline(MAX_LINE_BYTES)  # a line longer than the chunk, a traceback say
        except FileNotFoundError:
            return [], 0
        complete = data[: data.rfind(b"\n") + 1]
        if not complete and len(data) > MAX_LINE_BYTES:
            logger.warning("run %s: passed over %d bytes of its journal without a line", self.name, len(data))
            return [], start + len(data)
        events = []
        for line in complete.splitlines():
            if (event := parse(line)) is not None:
                events.append(event)
            elif line.strip() and not line.endswith(_CANCELLED):
                logger.warning("run %s: skipped a journal line that cannot be read: %r", self.name, line[:60])
        return events, start + len(complete)

    def state(self) -> RunState:
        """Where the run stands, from its journal and from whether a process holds its lock."""
        # The lock first: a run that ends between the two looks must not pass for interrupted.
        is_locked = self.is_locked()
        return self._catch_up().state(is_locked=is_locked)

    def is_locked(self) -> bool:
        """Whether some process is training this run on this machine."""
        return FileLock(self.lock_path).is_held() or FileLock(self.driver_lock_path).is_held()

    @property
    def end_offset(self) -> int:
        """Where the journal ends now, in bytes: what comes later is found with ``events(since=...)``."""
        return self.journal_path.stat().st_size if self.journal_path.exists() else 0

    def summary(self) -> JournalSummary:
        """What the journal says in one pass: attempt, step, target, last evaluations, end."""
        return dataclasses.replace(self._catch_up())

    @property
    def step(self) -> int:
        """The last step boundary in the journal; 0 before the first."""
        return self._catch_up().step

    @property
    def target_steps(self) -> int | None:
        """Where the last attempt was to end; ``None`` before the first."""
        return self._catch_up().target_steps

    @property
    def attempt(self) -> int:
        """How often the run was started; 0 for one that never was."""
        return self._catch_up().attempt

    def metrics_frame(self) -> pd.DataFrame:
        """One row per step, one column per metric, those of evaluations called ``val_...`` and ``test_...``.

        Where a resumed run repeats a step, the later line wins.
        """
        return metrics_frame(self.iter_events(("metrics", "eval")))

    def last_eval(self, split: str) -> dict[str, float] | None:
        """The values of the last evaluation on ``split`` (``val`` or ``test``), or ``None``."""
        event = self._catch_up().evals.get(split)
        return None if event is None else dict(event["values"])

    def best(self, objective: Objective) -> Event | None:
        """The ``eval`` line on ``val`` that is best by ``objective``; None before it was measured."""
        evals = (event for event in self.iter_events(("eval",)) if event["split"] == "val")
        return best_by(evals, objective)

    def best_checkpoint(self, objective: Objective) -> Event | None:
        """The best ``checkpoint`` line by ``objective`` of those that still exist (not verified here)."""
        return best_by(self.checkpoints(), objective)

    def checkpoints(self) -> list[Event]:
        """The ``checkpoint`` lines of those that still exist and were not found damaged since, oldest first."""
        found: dict[str, Event] = {}
        for event in self.iter_events(("checkpoint", "rejected")):
            found.pop(event["path"], None)  # committed anew, it counts from there
            if event["kind"] == "checkpoint":
                found[event["path"]] = event
        return [event for path, event in found.items() if (self.dir / path).is_dir()]

    def mark_stop(self) -> None:
        """Ask the run to stop at its next step boundary, wherever it runs. Repeating it is safe.

        Raises:
            NotFoundError: there is no such run.
        """
        self._stop.set()

    def stop_requested(self) -> bool:
        """Whether someone asked the run to stop since ``clear_stop``."""
        return self._stop.is_set()

    def clear_stop(self) -> None:
        """Forget an earlier request to stop: for the command that starts the run again, not its retries."""
        self._stop.clear()

    def _catch_up(self) -> JournalSummary:
        with self._folding:
            while True:
                events, end = self.events_since(self._offset)
                if end < self._offset:  # the run was deleted and made anew
                    self._folded = JournalSummary()
                for event in events:
                    self._folded.add(event)
                if end == self._offset:
                    return self._folded
                self._offset = end


def _guarded(storage: Storage, name: str, guard: Callable[[], None] | None) -> RunRecord:
    record = RunRecord(storage, name)
    record._guard = guard
    return record


def read_identity(path: Path) -> dict[str, Any]:
    """What a run or a sweep was asked for, in the shape that it was written in; parts may be missing.

    Raises:
        NotFoundError: there is no such file.
        CorruptError: it is damaged; the message says what to do.
        StorageError: it cannot be read.
    """
    found = read_json(path)
    damage = "it is no object"
    if isinstance(found, dict):
        wrong = [key for key in found if not _fits(key, found[key])]
        damage = f"{', '.join(wrong)} cannot be what was written" if wrong else ""
    if damage:
        raise CorruptError(
            f"{path} is damaged: {damage}. Restore it from a copy, or move {path.parent} away and start again "
            "under another name"
        )
    return dict(found)


def _fits(key: str, value: Any) -> bool:
    match key:
        case "recipe":
            return isinstance(value, str)
        case "fields":
            return isinstance(value, dict)
        case "space":
            return isinstance(value, dict) and all(isinstance(domain, dict) for domain in value.values())
        case "objective":
            return (
                isinstance(value, dict)
                and value.keys() == {"metric", "mode"}
                and isinstance(value["metric"], str)
                and value["mode"] in ("min", "max")
            )
        case "source":
            return (
                isinstance(value, dict)
                and value.keys() == {"run", "step", "digest"}
                and isinstance(value["step"], int)
                and all(isinstance(value[part], str) for part in ("run", "digest"))
            )
    return True


def being_trained(name: str, *, by: str = "") -> RequestError:
    """The error for a run that somebody trains already; ``by`` says who, where that is known."""
    return RequestError(
        f"run {name!r} is being trained already{f' ({by})' if by else ''}; follow it with `shoal logs {name} -f`, "
        f"stop it with `shoal stop {name}`, or choose another name"
    )


def list_runs(storage: Storage) -> list[RunRecord]:
    """The records of all runs on ``storage``, the newest first."""
    found = []
    for identity in storage.runs_dir.glob(f"*/{_IDENTITY}"):
        # A run that is deleted meanwhile is none.
        with suppress(FileNotFoundError):
            if is_name(identity.parent.name):
                found.append((identity.stat().st_mtime_ns, identity.parent.name))
    return [RunRecord(storage, name) for _, name in sorted(found, reverse=True)]
