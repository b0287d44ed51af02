"""A run's record on storage: who it is, what happened to it, where it stands. Needs no cluster, no MLflow."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import CorruptError, IdentityError, NotFoundError, RequestError
from shoal.storage import FileLock, Storage, append_line, create_json, read_json
from shoal.tracking.journal import (
    Event,
    Folded,
    RunState,
    best_by,
    encode,
    metrics_frame,
    parse,
)

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
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

    def __init__(self, storage: Storage, name: str, *, clock: Callable[[], float] = time.time) -> None:
        self.name = check_run_name(name)
        self._storage = storage
        self._clock = clock
        self.dir: Path = storage.run_dir(name)
        self.journal_path = self.dir / "journal.jsonl"
        self.checkpoints_dir = self.dir / "checkpoints"
        self.logs_dir = self.dir / "logs"
        self.lock_path = self.dir / "lock"
        """Held by rank 0 while it trains."""
        self.driver_lock_path = self.dir / "driver.lock"
        """Held by the process that keeps the workers alive: also while they start, or start again."""
        self._identity_path = self.dir / "identity.json"
        self._stop_path = self.dir / "stop"
        self._folding = threading.Lock()
        self._folded = Folded()
        self._offset = 0

    def __repr__(self) -> str:
        return f"RunRecord({self.name!r})"

    def __reduce__(self) -> Any:
        return RunRecord, (self._storage, self.name)

    # Identity

    def identity(self) -> dict[str, Any] | None:
        """What the run was first asked for, or ``None`` for a run that does not exist.

        Raises:
            CorruptError: the file is damaged.
        """
        if not self._identity_path.exists():
            return None
        identity = read_json(self._identity_path)
        if not isinstance(identity, dict):
            raise CorruptError(f"{self._identity_path} is damaged: it holds no identity of a run")
        return identity

    def claim_identity(self, identity: Mapping[str, Any]) -> bool:
        """Give the name to this identity, once and for all: True if it was free, False if it already is its.

        Of several processes that claim a free name at once exactly one gets True.

        Raises:
            IdentityError: the name belongs to another identity; the message shows every difference.
            CorruptError: what is recorded cannot be read.
            StorageError: it cannot be written.
        """
        asked = json.loads(json.dumps(dict(identity)))  # as it will be read back: tuples become lists
        if create_json(self._identity_path, asked):
            return True
        found = read_json(self._identity_path)
        if differences := _differences(found, asked):
            lines = [f"run {self.name!r} exists with another identity:"]
            lines += [f"  {path}: it has {old}, you asked for {new}" for path, old, new in differences]
            lines.append(
                "To go on with that run, ask for the values it has; to start another, leave the name out "
                "or choose a free one (name=..., or --name on the shell)."
            )
            raise IdentityError("\n".join(lines))
        return False

    # Journal

    def append(self, kind: str, **fields: Any) -> None:
        """Write one line to the journal; ``t`` and ``attempt`` are added, and ``start`` begins a new attempt.

        Raises:
            StorageError: it cannot be written.
            InternalError: not a line that the journal knows.
        """
        attempt = max(1, self._catch_up().attempt + (kind == "start"))
        line = encode(kind, t=self._clock(), attempt=attempt, fields=fields)
        append_line(self.journal_path, line)

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
        over.
        """
        try:
            with self.journal_path.open("rb") as file:
                size = file.seek(0, 2)
                start = offset if offset <= size else 0
                file.seek(start)
                data = file.read(_CHUNK_BYTES)
                if not data.endswith(b"\n"):
                    data += file.readline()  # a line longer than the chunk, a traceback say
        except FileNotFoundError:
            return [], 0
        complete = data[: data.rfind(b"\n") + 1]
        events = []
        for line in complete.splitlines():
            if (event := parse(line)) is not None:
                events.append(event)
            elif line.strip() and not line.endswith(_CANCELLED):
                logger.warning("run %s: skipped a journal line that cannot be read: %.80r", self.name, line)
        return events, start + len(complete)

    # What the journal says

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

    def summary(self) -> Folded:
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

    def best(self, metric: str, mode: str) -> Event | None:
        """The ``eval`` line on ``val`` with the best ``metric``; ``mode`` is ``max`` or ``min``."""
        evals = (event for event in self.iter_events(("eval",)) if event["split"] == "val")
        return best_by(evals, metric, mode)

    def best_checkpoint(self, metric: str, mode: str) -> Event | None:
        """The ``checkpoint`` line with the best ``metric`` of those that still exist (not verified here)."""
        lines = (event for event in self.iter_events(("checkpoint",)) if (self.dir / event["path"]).is_dir())
        return best_by(lines, metric, mode)

    # Stopping

    def mark_stop(self) -> None:
        """Ask the run to stop at its next step boundary, wherever it runs. Repeating it is safe."""
        if not self._identity_path.exists():
            raise NotFoundError(f"no run {self.name!r} in {self._storage.runs_dir}; see `shoal runs`")
        self._stop_path.touch()

    def stop_requested(self) -> bool:
        """Whether someone asked the run to stop since ``clear_stop``."""
        return self._stop_path.exists()

    def clear_stop(self) -> None:
        """Forget an earlier request to stop: for the command that starts the run again, not its retries."""
        self._stop_path.unlink(missing_ok=True)

    def _catch_up(self) -> Folded:
        with self._folding:
            while True:
                events, end = self.events_since(self._offset)
                if end < self._offset:  # the run was deleted and made anew
                    self._folded = Folded()
                for event in events:
                    self._folded.add(event)
                if end == self._offset:
                    return self._folded
                self._offset = end


def check_run_name(name: str) -> str:
    """``name``, if it may name a run.

    Raises:
        RequestError: it may not; the message says what may.
    """
    if not isinstance(name, str) or not _RUN_NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} cannot name a run: use 1 to 80 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )
    return name


def list_runs(storage: Storage) -> list[RunRecord]:
    """The records of all runs on ``storage``, the newest first."""
    found = []
    for identity in storage.runs_dir.glob("*/identity.json"):
        # A run that is deleted meanwhile is none.
        with suppress(FileNotFoundError):
            if _RUN_NAME.fullmatch(identity.parent.name):
                found.append((identity.stat().st_mtime_ns, identity.parent.name))
    return [RunRecord(storage, name) for _, name in sorted(found, reverse=True)]


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, str, str]]:
    """Every leaf that differs: dotted path, old and new value as JSON (``nothing`` where it is absent)."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in [*old, *(key for key in new if key not in old)]
            for difference in _differences(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else key
            )
        ]
    if isinstance(old, bool) == isinstance(new, bool) and (old == new or _show(old) == _show(new)):
        return []
    return [(path, _show(old), _show(new))]


_ABSENT = object()


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)
