"""Start a run on a cluster and keep its workers alive, as many as wished, from a thread of whoever asked for it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.capacity import Resources, grant, room, snapshot
from shoal.cluster.imports import remember_imports
from shoal.config.values import Range
from shoal.errors import DeadlineExceeded, SupersededError
from shoal.storage import FileLock, make_directories
from shoal.tracking import RunRecord, RunState, Wish, being_trained
from shoal.train.elastic import Elastic, looking
from shoal.train.loss import record_loss
from shoal.train.run import Run
from shoal.train.spec import RunSpec
from shoal.train.stall import record_stall

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from shoal.train.workers import Workers

HOLD_OUT_S = 5.0
"""How long a run that is being resized waits for the room it expects before it takes less."""


def launch(spec: RunSpec, *, workers: Range, resources_per_worker: Resources, retries: int) -> Run:
    """Start the run, or go on with it, or return it if it is finished. Returns at once.

    The caller must be attached to a cluster. ``retries`` is how often within an hour workers that died are replaced.

    Raises:
        IdentityError: the name belongs to a run with another identity.
        RequestError: the run is being trained already, or the cluster can never have so many workers.
        StorageError: the storage is full or not writable.
    """
    if finished_run(spec, RunRecord(spec.storage, spec.name)) is None:
        # Refuses what can never start, while nothing is written yet.
        grant(snapshot(), workers, resources_per_worker)
    record = prepare(spec)
    finished = finished_run(spec, record)
    if finished is not None:
        return finished
    driver = WorkersDriver(spec, record, workers, resources_per_worker, retries)
    driver.start()
    return Run(record, driver=driver)


def prepare(spec: RunSpec) -> RunRecord:
    """Check the storage and give the run its name, before any cluster work.

    Raises:
        IdentityError, RequestError, StorageError: as in `launch`.
    """
    spec.storage.check()
    record = RunRecord(spec.storage, spec.name)
    record.claim_identity(spec.identity())
    if record.is_locked():
        raise being_trained(spec.name)
    return record


def finished_run(spec: RunSpec, record: RunRecord) -> Run | None:
    """The run, if it already has as many steps as are asked for."""
    if record.state() != RunState.FINISHED or record.step < spec.target_steps:
        return None
    return Run(
        record, note=f"run {spec.name!r} finished before, at step {record.step:,}; nothing was trained"
    )


class WorkersDriver:
    """A thread that keeps the workers of one run alive; see `run.Driver`.

    ``placement_group`` is for a caller that holds the workers' room already, as in `workers.Workers`: their number
    never changes. Without one it does as the range and `resize` wish, at step boundaries.
    """

    def __init__(
        self,
        spec: RunSpec,
        record: RunRecord,
        workers: Range,
        resources_per_worker: Resources,
        retries: int,
        *,
        placement_group: PlacementGroup | None = None,
    ) -> None:
        self._spec = spec
        self._record = record
        self._workers = workers
        self._resources_per_worker = resources_per_worker
        self._retries = retries
        self._placement_group = placement_group
        self._elastic = (
            Elastic(
                record,
                Wish(
                    workers=workers,
                    most=spec.recipe.batch_size if spec.shards is None else spec.shards,
                    per_worker=resources_per_worker,
                ),
                free_room=lambda: room(snapshot(), resources_per_worker),
            )
            if placement_group is None
            else None
        )
        self._begin = record.end_offset
        self._driving = FileLock(record.driver_lock_path)
        self._failure: BaseException | None = None
        self._group: Workers | None = None
        self._aborted = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drive, name=f"shoal-run-{spec.name}", daemon=True)

    def start(self, *, heed_stop: bool = False) -> None:
        """Begin; returns at once. ``heed_stop``: an earlier request to stop the run is meant for this start too.

        Raises:
            RequestError: another process drives the run.
            StorageError: storage is full or not writable.
        """
        try:
            self._driving.acquire()
        except DeadlineExceeded as err:
            raise being_trained(self._spec.name, by=str(err)) from None
        try:
            self._take_token()
            if not heed_stop:
                self._record.clear_stop()
            if self._elastic is not None:
                self._elastic.begin()
            else:
                self._record.resizing.begin(None)
            self._record.note(
                "driver", workers=str(self._workers), host=socket.gethostname(), pid=os.getpid()
            )
        except BaseException:
            self._driving.release()
            raise
        self._thread.start()

    def _take_token(self) -> None:
        """From now on nothing that another driver commits counts; nor does ours when yet another one begins."""
        token = self._record.fence.take()
        self._spec = replace(self._spec, driver=token.number)
        self._record.guard_with(token.check_driver)

    def is_alive(self) -> bool:
        """True until the run ended, whichever way."""
        return self._thread.is_alive()

    def failure(self) -> BaseException | None:
        """Why the driver gave up, if it did."""
        return self._failure

    def waits_for(self) -> str:
        """What keeps the run from starting: room, or its workers' processes."""
        group = self._group
        wanted = self._wanted()
        count = f"{wanted} worker{'s' if wanted.max > 1 else ''}"
        return f"{count} to start" if group is not None and group.has_room else f"room for {count}"

    def begin(self) -> int:
        """Where the journal ended when this driver began, in bytes."""
        return self._begin

    def stop(self) -> None:
        """Stop the run at its next step boundary, or at once if it has not started. Does not wait for it."""
        self._record.mark_stop()
        if not self._record.events(("start",), since=self._begin):
            threading.Thread(target=self.abort, name="shoal-abort", daemon=True).start()

    def abort(self) -> None:
        """End the workers at once. Blocks for a few seconds at most; safe to repeat."""
        with self._lock:
            self._aborted = True
            group = self._group
        if group is not None:
            group.abort()
        self._thread.join(timeout=15.0)

    def _drive(self) -> None:
        try:
            self._run_workers()
        except BaseException as err:  # the thread's own boundary: `Run.wait` raises it in the caller
            self._failure = err
            try:
                self._record_failure(err)
            except SupersededError as superseded:
                self._failure = superseded
        finally:
            self._driving.release()

    def _run_workers(self) -> None:
        from shoal.train.workers import Workers

        group = Workers(
            train_on_worker,
            {"spec": self._spec},
            name=self._spec.name,
            workers=self._wanted,
            resources_per_worker=self._resources_per_worker,
            max_failures=self._retries,
            storage_path=_ray_folder(self._spec),
            placement_group=self._placement_group,
            on_stall=partial(record_stall, self._record),
            on_loss=partial(record_loss, self._record),
            on_grant=self._granted,
        )
        with self._lock:
            self._group = group
            if self._aborted:
                return
        if self._elastic is None:
            group.run()
        else:
            self._run_elastic(group, self._elastic)

    def _run_elastic(self, group: Workers, elastic: Elastic) -> None:
        """Run the group, and run it again whenever it ended for another number of workers to go on."""
        was_stopped = False

        def look() -> None:
            nonlocal was_stopped
            if elastic.is_between() and self._record.stop_requested():
                was_stopped = True  # all is committed: nobody need start for that
                group.abort()
            else:
                elastic.look()

        with looking(look):
            group.run()
            while elastic.is_between() and not (self._aborted or self._record.stop_requested()):
                group.run(hold_out_s=HOLD_OUT_S)
        is_over = self._record.summary().ended is not None
        if (was_stopped or elastic.is_between()) and not (is_over or self._aborted):
            self._record.append_end(RunState.STOPPED, step=self._record.step)

    def _granted(self, num_workers: int, seconds: float) -> None:
        self._record.note("grant", workers=num_workers, seconds=round(seconds, 6))

    def _wanted(self) -> Range:
        return self._workers if self._elastic is None else self._elastic.wanted()

    def _record_failure(self, err: BaseException) -> None:
        if isinstance(err, SupersededError):
            return  # the record is another driver's
        last = self._record.events(("start", "end"), since=self._begin)[-1:]
        if last and last[0]["kind"] == "end":
            return  # the workers have said how it ended
        self._record.append_end(RunState.FAILED, step=self._record.step, failure=err)


IMPORTS_KNOWN_S = (3.0, 30.0)
"""When, after a worker's start, it has probably imported what its recipe needs; looked at then."""


def train_on_worker(config: dict[str, Any]) -> None:
    """What runs in every worker process on the cluster."""
    from shoal.train.engine import train_worker
    from shoal.train.group import Group
    from shoal.train.output import captured_output, log_path
    from shoal.train.stacks import dumps_on_signal

    spec: RunSpec = config["spec"]
    group = Group.current()
    record = RunRecord(spec.storage, spec.name)
    with (
        captured_output(log_path(record.logs_dir, group.rank)),
        dumps_on_signal(),
        _imports_noted(is_mine=group.is_first),
    ):
        train_worker(spec, group)


@contextmanager
def _imports_noted(*, is_mine: bool) -> Iterator[None]:
    """While a run trains, note what it imported, so that the process of a replacement has it already."""
    ended = threading.Event()

    def note() -> None:
        for delay_s in IMPORTS_KNOWN_S:
            if not ended.wait(delay_s):
                remember_imports()

    if is_mine:
        threading.Thread(target=note, name="shoal-imports", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _ray_folder(spec: RunSpec) -> Path:
    """Where Ray Train may leave its own small files; nothing of ours is read from there."""
    folder = spec.storage.root / "ray"
    make_directories(folder)
    return folder
