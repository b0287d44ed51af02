"""Delivering journals to MLflow: one process per storage, in the background, as long as it takes."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import (
    CorruptError,
    DeadlineExceeded,
    NotFoundError,
    RequestError,
    ShoalError,
    StorageError,
    TrackingError,
)
from shoal.storage import MAX_LINE_BYTES, FileLock, Storage, open_plain, read_json, write_json
from shoal.tracking.delivery import (
    Batch,
    clean_text,
    experiment_name,
    plan_metrics,
    plan_params,
    plan_tags,
    plan_timeline,
    start_tags,
)
from shoal.tracking.journal import END_STATES, Event, RunState
from shoal.tracking.mlflow_store import MlflowStore, without_credentials
from shoal.tracking.record import RunRecord, list_runs
from shoal.tracking.registry_store import RegistryStore
from shoal.tracking.timeline import timeline_of

logger = logging.getLogger(__name__)

POLL_S = 1.0
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
_MAX_LOG_BYTES = 256 * 1024
_MAX_WARNINGS = 20
TIMELINE_FILE = "timeline.json"
"""The artifact with a run's timeline, beside its metrics ``timeline/...``."""


@dataclass(frozen=True, kw_only=True)
class TrackerStatus:
    """How far delivery is."""

    state: str
    """``starting`` (MLflow is being opened), ``ok``, ``behind`` (delivering) or ``error`` (tries again)."""
    uri: str
    """Where MLflow is; without credentials."""
    behind_runs: int
    behind_bytes: int
    """Of journals not delivered yet; 0 when MLflow knows everything."""
    error: str = ""
    """Why the last try failed; empty unless ``state`` is ``error``."""
    warnings: tuple[str, ...] = ()
    """What MLflow will not get, the latest last; also in the log."""


@dataclass
class _Progress:
    """How far one run's journal has been delivered; kept in ``delivered/<run>.json``."""

    journal: str
    """Digest of the journal's first line: a run that was deleted and made anew is another one."""
    run_id: str = ""
    """MLflow's id of the run; empty until it is made there."""
    offset: int = 0
    state: str = ""
    """The state MLflow was told last."""
    inode: int = field(default=0, compare=False)
    behind_bytes: int = field(default=0, compare=False)
    refused_bytes: int = field(default=-1, compare=False)
    """Length of the journal when MLflow refused the whole run; tried again when it has grown."""


class Tracker:
    """Delivers every run's journal to MLflow, and owns the registry, which writes to the same store.

    ``start`` begins polling in the background; ``poll`` is one pass, for those who do without. While MLflow
    does not answer nothing is lost: the journals are the record, and ``<storage>/tracking/delivered`` says
    how far each was delivered. Being killed at any moment costs at most a repeated, harmless delivery.
    """

    def __init__(
        self,
        storage: Storage,
        uri: str,
        *,
        open_store: Callable[[], MlflowStore] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._uri = without_credentials(uri)
        self._artifacts_dir = storage.tracking_dir / "artifacts"
        self._open_store = open_store or (lambda: MlflowStore(uri, artifacts_dir=self._artifacts_dir))
        self._clock = clock
        self._delivered_dir = storage.tracking_dir / "delivered"
        self._lock_file = FileLock(storage.tracking_dir / "lock")
        self._opening = threading.Lock()
        self._store: MlflowStore | None = None
        self._polling = threading.Lock()
        self._progress: dict[str, _Progress] = {}
        self._warnings: list[str] = []
        self._troubled: set[str] = set()
        """Runs whose delivery failed at the last try, each warned of once."""
        self._error = ""
        self._failures = 0
        self._not_before = float("-inf")
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.registry = RegistryStore(self.store, storage, run_id=self.mlflow_run_id)

    def start(self) -> None:
        """Poll in a background thread until ``close``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._poll_for_ever, name="shoal-tracker", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop polling and let another process be the tracker; what is not delivered waits for it."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=60.0)
        self._lock_file.release()

    def store(self) -> MlflowStore:
        """MLflow, opened by this process alone.

        Raises:
            TrackingError: it does not answer, or another process is this storage's tracker.
        """
        with self._opening:
            if self._store is None:
                try:
                    self._lock_file.acquire()
                except DeadlineExceeded as error:
                    raise TrackingError(
                        f"another tracker serves {self._storage.root} ({error}). Stop that cluster "
                        "(`shoal down` in its project), or give this one another `storage:`"
                    ) from error
                self._store = self._open_store()
            return self._store

    def status(self) -> TrackerStatus:
        """How far delivery is, as of the last pass; never blocks."""
        behind = [
            progress.behind_bytes for progress in list(self._progress.values()) if progress.behind_bytes
        ]
        if self._error:
            state = "error"
        elif self._store is None:
            state = "starting"
        else:
            state = "behind" if behind else "ok"
        return TrackerStatus(
            state=state,
            uri=self._uri,
            behind_runs=len(behind),
            behind_bytes=sum(behind),
            error=self._error,
            warnings=tuple(self._warnings),
        )

    def mlflow_run_id(self, run: str) -> str | None:
        """MLflow's id of the run, or ``None`` while MLflow does not know it."""
        progress = self._progress.get(run)
        return (progress.run_id or None) if progress is not None else None

    def flush(self) -> TrackerStatus:
        """Deliver now, without waiting for a backoff; blocks for one pass and says how far it got."""
        self._not_before = float("-inf")
        self.poll()
        return self.status()

    def poll(self) -> None:
        """Deliver what is new in every journal; trouble with MLflow or the disk is kept for ``status``."""
        with self._polling:
            if self._clock() < self._not_before:
                return
            try:
                self._deliver_all()
            except (TrackingError, StorageError) as error:
                self._back_off(str(error))
            except Exception as error:  # a bug must not end delivery for every run
                logger.exception("delivery to MLflow failed; trying again")
                self._back_off(f"{type(error).__name__}: {error}")
            else:
                self._error, self._failures = "", 0

    def _poll_for_ever(self) -> None:
        while not self._closing.is_set():
            self.poll()
            self._closing.wait(POLL_S)

    def _back_off(self, error: str) -> None:
        if not self._error:
            logger.warning("%s; runs go on, and what is missing will be delivered later", error)
        self._error = error
        self._failures += 1
        delay = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(self._failures - 1, 10))
        self._not_before = self._clock() + delay

    def _deliver_all(self) -> None:
        records = list_runs(self._storage)[::-1]
        for name in self._progress.keys() - {record.name for record in records}:
            del self._progress[name]  # its directory is gone
        # Measure first: when MLflow does not answer, status still says how much waits.
        waiting = []
        for record in records:
            with self._apart(record.name):
                if (progress := self._measure(record)) is not None:
                    waiting.append((record, progress))
        store = self.store()
        for record, progress in waiting:
            if self._closing.is_set():
                return
            with self._apart(record.name):
                self._deliver(store, record, progress)
                self._troubled.discard(record.name)

    @contextmanager
    def _apart(self, run: str) -> Iterator[None]:
        """Keep trouble with one run's files from the others: one warning, and the next pass tries it again."""
        try:
            yield
        except TrackingError:
            raise  # MLflow does not answer, for any run
        except Exception as error:  # a bug too must not end delivery for every run
            if run not in self._troubled:
                self._troubled.add(run)
                if not isinstance(error, ShoalError | OSError):
                    logger.exception("a fault in delivering run %s", run)
                self._warn(f"run {run} is not delivered: {error or type(error).__name__}")

    def _measure(self, record: RunRecord) -> _Progress | None:
        """How far the run's journal has been delivered and what waits; ``None`` before its first line."""
        try:
            stat = record.journal_path.stat()
        except FileNotFoundError:
            return None
        progress = self._progress.get(record.name)
        if progress is None or progress.inode != stat.st_ino or progress.offset > stat.st_size:
            if (journal := _journal_id(record)) is None:
                return None
            progress = self._load(record.name, journal)
            progress.inode = stat.st_ino
            self._progress[record.name] = progress
        progress.behind_bytes = max(0, stat.st_size - progress.offset)
        return progress

    def _deliver(self, store: MlflowStore, record: RunRecord, progress: _Progress) -> None:
        if progress.behind_bytes == 0 and progress.state in END_STATES:
            return
        size_bytes = progress.offset + progress.behind_bytes
        if progress.refused_bytes == size_bytes:
            progress.behind_bytes = 0
            return
        try:
            while True:
                events, offset = record.events_since(progress.offset)
                if offset == progress.offset:
                    break
                self._deliver_events(store, record, progress, events)
                progress.offset = offset
                self._save(record.name, progress)
            progress.behind_bytes = 0  # half a line may wait for its end
            self._deliver_state(store, record, progress, size_bytes)
        except NotFoundError as error:
            # The run was purged from MLflow, or the whole store was: tell it everything again.
            self._warn(f"run {record.name} is gone from MLflow, delivering it again ({error})")
            fresh = _Progress(
                progress.journal, inode=progress.inode, behind_bytes=record.journal_path.stat().st_size
            )
            self._progress[record.name] = fresh
            self._save(record.name, fresh)
        except RequestError as error:
            # Deleted in MLflow's page, say: no reason to hold up the other runs, or to try every second.
            self._warn(f"run {record.name} is not delivered while MLflow refuses it: {error}")
            progress.refused_bytes, progress.behind_bytes = size_bytes, 0

    def _deliver_events(
        self, store: MlflowStore, record: RunRecord, progress: _Progress, events: list[Event]
    ) -> None:
        if not progress.run_id and events:
            self._begin(store, record, progress, events[0])
        batches = plan_metrics(events)
        for event in events:
            if event["kind"] == "start":
                batches += plan_tags(start_tags(event))
        for batch in batches:
            self._log(store, record.name, progress.run_id, batch)
        if boundaries := [event for event in events if event["kind"] in ("start", "end")]:
            last = boundaries[-1]
            state = last["state"] if last["kind"] == "end" else RunState.RUNNING.value
            store.set_state(progress.run_id, state, end_ms=int(last["t"] * 1000))
            progress.state = state
            if state == RunState.FAILED:
                self._keep_failure(store, record, progress.run_id, last)
            if last["kind"] == "end":
                self._deliver_timeline(store, record, progress.run_id, last)

    def _deliver_timeline(self, store: MlflowStore, record: RunRecord, run_id: str, end: Event) -> None:
        """Goodput and counts as metrics, all of it as a file, as of this end of the run."""
        timeline = timeline_of(_up_to(end, record.iter_events()))
        for batch in plan_timeline(timeline, step=_step_of(end), t=end["t"]):
            self._log(store, record.name, run_id, batch)
        self._keep(store, record.name, run_id, json.dumps(timeline.as_dict(), indent=1), TIMELINE_FILE)

    def _begin(self, store: MlflowStore, record: RunRecord, progress: _Progress, first: Event) -> None:
        try:
            identity = record.identity() or {}
        except CorruptError as error:
            self._warn(f"run {record.name} is delivered without parameters: {error}")
            identity = {}
        sweep = self._sweep_of(record)
        recipe = str(identity.get("recipe", ""))
        tags = {"shoal.run": record.name, "shoal.recipe": recipe, "shoal.sweep": sweep or ""}
        run_id = store.ensure_run(
            experiment=experiment_name(identity, sweep=sweep),
            name=record.name,
            journal=progress.journal,
            start_ms=int(first["t"] * 1000),
            tags={key: clean_text(value) for key, value in tags.items() if value},
        )
        for batch in plan_params(identity):
            self._log(store, record.name, run_id, batch)
        if identity:
            text = json.dumps(identity, indent=2, sort_keys=True)
            self._keep(store, record.name, run_id, text, record.identity_path.name)
        progress.run_id = run_id  # last: cut off before, all of this is done again

    def _sweep_of(self, record: RunRecord) -> str | None:
        """The sweep whose trial the run is."""
        try:
            trial = record.trial()
        except CorruptError as error:
            self._warn(f"run {record.name} is delivered on its own, outside its sweep: {error}")
            return None
        return trial[0] if trial else None

    def _deliver_state(
        self, store: MlflowStore, record: RunRecord, progress: _Progress, size_bytes: int
    ) -> None:
        """Say that a run is interrupted, which its journal cannot say, and that it no longer is.

        Only if the journal still has ``size_bytes``: an ``end`` that was just written knows better.
        """
        if not progress.run_id or progress.state in END_STATES:
            return
        # Not record.state(): that would read the whole journal again, every second.
        state = RunState.RUNNING if record.is_locked() else RunState.INTERRUPTED
        stat = record.journal_path.stat()
        if state.value != progress.state and stat.st_size == size_bytes:
            store.set_state(progress.run_id, state.value, end_ms=int(stat.st_mtime * 1000))
            progress.state = state.value
            self._save(record.name, progress)

    def _log(self, store: MlflowStore, run: str, run_id: str, batch: Batch) -> None:
        """Deliver a batch; when MLflow refuses it, all of it but the entries that it refuses."""
        if not len(batch):
            return
        try:
            store.log(run_id, batch)
        except NotFoundError:
            raise  # the whole run is gone
        except RequestError as error:
            if len(batch) > 1 and store.is_active(run_id):
                for half in batch.halves():
                    self._log(store, run, run_id, half)
            else:
                self._warn(f"run {run}: left out of MLflow: {error}")

    def _keep_failure(self, store: MlflowStore, record: RunRecord, run_id: str, end: Event) -> None:
        if end.get("traceback"):
            self._keep(store, record.name, run_id, end["traceback"], "traceback.txt")
        for path in sorted(record.logs_dir.glob("*.log")):
            with open_plain(path) as file:
                file.seek(max(0, path.stat().st_size - _MAX_LOG_BYTES))
                text = file.read().decode(errors="replace")
            self._keep(store, record.name, run_id, text, f"logs/{path.name}")

    def _keep(self, store: MlflowStore, run: str, run_id: str, text: str, path: str) -> None:
        """Keep a small file beside the run, best effort: it is on storage anyway."""
        try:
            store.log_text(run_id, text, path)
        except ShoalError as error:
            self._warn(f"run {run}: {path} was not copied to MLflow: {error}")

    def _warn(self, message: str) -> None:
        logger.warning("%s", message)
        self._warnings = [*self._warnings, message][-_MAX_WARNINGS:]

    def _load(self, run: str, journal: str) -> _Progress:
        path = self._delivered_dir / f"{run}.json"
        try:
            saved: dict[str, Any] = read_json(path)
            if saved["journal"] == journal:
                if (offset := int(saved["offset"])) < 0:
                    raise ValueError(f"offset {offset}")
                return _Progress(journal, str(saved["run_id"]), offset, str(saved["state"]))
        except NotFoundError:
            pass  # nothing delivered yet
        except (CorruptError, KeyError, TypeError, ValueError, OverflowError) as error:
            self._warn(f"{path} cannot be read, delivering run {run} again: {error!r}")
        return _Progress(journal)

    def _save(self, run: str, progress: _Progress) -> None:
        write_json(
            self._delivered_dir / f"{run}.json",
            {
                "journal": progress.journal,
                "run_id": progress.run_id,
                "offset": progress.offset,
                "state": progress.state,
            },
        )


def _up_to(last: Event, events: Iterable[Event]) -> Iterator[Event]:
    """Delivered again when the run has gone on, an end says what it said before."""
    for event in events:
        yield event
        if event == last:
            return


def _step_of(end: Event) -> int:
    step = end.get("step")
    return step if isinstance(step, int) else 0


def _journal_id(record: RunRecord) -> str | None:
    """A digest of the journal's first line, which holds the time the run first started."""
    with open_plain(record.journal_path) as file:
        line = file.readline(MAX_LINE_BYTES)
    return hashlib.sha256(record.name.encode() + line).hexdigest()[:32] if line.endswith(b"\n") else None
