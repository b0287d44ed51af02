"""Start a group of workers on the cluster, restart it when one dies, stop it.

Ray Train does the work, with the parts that `ray_edge` replaces. Like that module this one imports torch and
ray at the top.
"""

from __future__ import annotations

import enum
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from shoal.capacity import Resources, wait_for_grant
from shoal.config import Range
from shoal.errors import (
    ClusterError,
    DeadlineExceeded,
    PeerLost,
    ShoalError,
    SupersededError,
    WorkerLost,
)
from shoal.train.loss import LossReport, OnLoss
from shoal.train.ray_edge import Trainer, found_no_room, is_worth_a_restart, keep_raylet_quiet
from shoal.train.retries import Retries
from shoal.train.stall import OnStall

_POLL_S = 0.2
"""Between an answer of the workers and the controller's next question; a death is acted on that much later at
worst."""

_ABORT_PATIENCE_S = 5.0
"""How long an abort may take the polite way; after that the controller is killed and cleaned up after."""

_NUM_GRANTS = 5
"""How often room that was granted may be taken by somebody else before the workers were there."""


class _End(enum.Enum):
    """How a controller came to its end, other than by an error of its own."""

    DONE = enum.auto()
    NO_ROOM = enum.auto()
    """Somebody else took what was granted."""
    CONTROLLER_LOST = enum.auto()


def _verdict(error: WorkerGroupError) -> ShoalError | None:
    """What ended a group for good, of all that its workers raised; None where another start might help.

    One that was superseded tells its peers nothing: what they see is a peer that they lost.
    """
    if is_worth_a_restart(error):
        return None
    failures = [failure for failure in error.worker_failures.values() if isinstance(failure, ShoalError)]
    return min(failures, key=_weight, default=None)


def _weight(failure: ShoalError) -> int:
    return 0 if isinstance(failure, SupersededError) else 2 if isinstance(failure, PeerLost) else 1


class Workers:
    """A group of training workers on the cluster; `run` it in a thread, `abort` it from any other.

    Args:
        fn: runs on every worker with ``config``, in a thread; ``torch.distributed`` is initialised there
            (gloo on CPU, nccl where a worker has a GPU) and RANK, WORLD_SIZE, LOCAL_RANK, ... are set. A
            module-level function travels by name. It sees OMP_NUM_THREADS as Ray set it: one worker's CPUs.
            Where it raises `PeerLost` its process stays: it is called again when the dead were replaced.
        name: for Ray's pages and logs; need not be unique.
        workers: how many are wanted; asked, and granted from what is free, again at each new start.
        resources_per_worker: Ray resources, such as ``{"CPU": 1}``.
        max_failures: how many times within an hour workers that died are replaced (`Retries`), and a controller is.
        storage_path: an existing folder; Ray Train leaves a small folder of its own under ``<storage_path>``.
        grant_wait_s: how long to wait for ``workers.min`` to be free.
        start_timeout_s: how long reserving room that was granted may take before it is granted anew. Takes
            milliseconds unless somebody else was faster, or what Ray says is free was out of date.
        collective_timeout_s: how long a worker waits for its peers in one collective before it fails.
        placement_group: one that the caller holds, whose bundle n is room for worker n. The workers start, and
            start again, in it instead of in room that is granted; it stays when they are gone. ``workers`` is
            then always one number, that of its bundles.
        on_stall: told of every worker that hangs (`StallReport`), in the controller's process, before the worker is
            replaced. It is pickled: keep what it holds small, as the controller imports it.
        on_loss: told of workers that died, the same way; and, in this process, of a controller that did.
        on_grant: told of each number of workers that there is room for now, and how many seconds that took.
    """

    def __init__(
        self,
        fn: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        *,
        name: str,
        workers: Callable[[], Range],
        resources_per_worker: Resources,
        max_failures: int,
        storage_path: Path,
        grant_wait_s: float = 60.0,
        start_timeout_s: float = 3.0,
        collective_timeout_s: float = 120.0,
        placement_group: PlacementGroup | None = None,
        on_stall: OnStall | None = None,
        on_loss: OnLoss | None = None,
        on_grant: Callable[[int, float], None] | None = None,
    ) -> None:
        self._fn = fn
        self._config = config
        self._name = name
        self._workers = workers
        self._resources_per_worker = dict(resources_per_worker)
        self._max_failures = max_failures
        self._controllers = Retries(max_failures)
        self._storage_path = storage_path
        self._grant_wait_s = grant_wait_s
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._placement_group = placement_group
        self._on_stall, self._on_loss, self._on_grant = on_stall, on_loss, on_grant
        # Ray Train resumes a name it has seen, from files it does not verify: each start gets a new one.
        self._ray_name = f"shoal-{name}-{uuid.uuid4().hex[:8]}"
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._controller: Any = None
        self._num_failures = 0

    @property
    def has_room(self) -> bool:
        """Whether room was granted and the workers start, or run."""
        return self._controller is not None

    def run(self, *, hold_out_s: float = 0.0) -> None:
        """Run until ``fn`` returned on every worker; returns early, without an error, after `abort`.

        Blocks. Whichever way it ends, no actor and no placement group that it made remains, and unless it was
        aborted it may be run again; what counts against ``max_failures`` then begins anew. ``hold_out_s``: how
        long to wait for the most that are wanted before fewer will do; Ray says that room is free some moments
        after it is.

        Raises:
            RequestError: the workers can never fit into this cluster.
            DeadlineExceeded: no room for the least number of workers; says who holds it.
            WorkerLost: workers died more often than ``max_failures`` allows.
            ClusterError: the cluster does not answer.
            ShoalError: whatever ``fn`` raised of that kind.
        """
        num_taken = 0
        while num_taken < _NUM_GRANTS:
            asked = time.monotonic()
            granted = self._wait_for_grant(hold_out_s)
            if self._on_grant is not None and not self._stop.is_set():
                self._on_grant(granted, time.monotonic() - asked)
            try:
                end = _End.DONE if self._stop.is_set() else self._run_group(granted)
            finally:
                self._clean_up()
            if end is _End.DONE:
                return
            num_taken += end is _End.NO_ROOM
        raise DeadlineExceeded(
            f"run {self._name}: room for {self._workers()} worker(s) was free {_NUM_GRANTS} times and taken by "
            f"somebody else each time before the workers were there. See `shoal status`, or try again."
        )

    def abort(self) -> None:
        """Stop the workers without asking them; safe to call at any time, from any thread, and again.

        Blocks for at most a few seconds. `run` returns once everything is gone.
        """
        self._stop.set()
        with self._lock:
            controller = self._controller
        if controller is None:
            return
        try:
            ray.get(controller.abort.remote(), timeout=_ABORT_PATIENCE_S)
        except (RayActorError, GetTimeoutError):
            ray.kill(controller)  # gone already, or busy starting workers: they die with it

    def _wait_for_grant(self, hold_out_s: float) -> int:
        if self._placement_group is not None:
            return self._workers().min
        return wait_for_grant(
            self._workers,
            self._resources_per_worker,
            wait_s=self._grant_wait_s,
            hold_out_s=hold_out_s,
            stop=self._stop,
        )

    def _run_group(self, num_workers: int) -> _End:
        """Run one controller to its end."""
        self._controllers.started()
        error = self._fit(num_workers)
        if error is None or self._stop.is_set():
            return _End.DONE
        if isinstance(error, RayActorError):  # the controller died: its workers died with it
            self._num_failures += 1
            if self._on_loss is not None:
                self._on_loss(
                    LossReport(ranks=[], step=0, why="the controller died, and the workers with it")
                )
            pause_s = self._controllers.failed()
            if pause_s is None:
                raise WorkerLost(self._lost_message(error)) from error
            self._stop.wait(pause_s)
            return _End.CONTROLLER_LOST
        if found_no_room(error):
            return _End.NO_ROOM
        if isinstance(error, ControllerError) and not is_worth_a_restart(error):
            raise ClusterError(f"run {self._name}: Ray Train failed: {error.controller_failure}") from error
        if isinstance(error, WorkerGroupError):
            verdict = _verdict(error)
            if verdict is not None:
                raise verdict
        raise WorkerLost(self._lost_message(error)) from error

    def _fit(self, num_workers: int) -> Exception | None:
        """Start a controller, wait for it, and return how it failed; None when all went well."""
        trainer = Trainer(
            self._fn,
            train_loop_config=self._config,
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=bool(self._resources_per_worker.get("GPU")),
                resources_per_worker=self._resources_per_worker,
            ),
            run_config=RunConfig(
                name=self._ray_name,
                storage_path=str(self._storage_path),
                failure_config=FailureConfig(max_failures=self._max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
            environment={
                "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(_POLL_S),
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(self._start_timeout_s),
                # An actor more, for node preemption notices, which no target has yet.
                "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
                # The controller waits for its workers in an event loop on purpose.
                "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
            },
            lent=self._placement_group,
            collective_timeout_s=self._collective_timeout_s,
            on_stall=self._on_stall,
            on_loss=self._on_loss,
            watch=self._watch,
        )
        keep_raylet_quiet()
        failure: Exception | None = None
        try:
            trainer.fit()
        except (WorkerGroupError, ControllerError, RayActorError) as error:
            failure = error
        except RayError as error:
            raise ClusterError(f"run {self._name}: the cluster does not answer: {error}") from error
        return failure

    def _watch(self, controller: Any) -> Any:
        with self._lock:
            self._controller = controller
        if self._stop.is_set():  # abort() came before there was anything to abort
            ray.kill(controller)
        ray.get(controller.run.remote())
        self._num_failures += ray.get(controller.num_failures.remote())
        return ray.get(controller.get_result.remote())

    def _clean_up(self) -> None:
        """Leave no controller, no placement group (one outlives a controller that was killed), no folder."""
        with self._lock:
            controller, self._controller = self._controller, None
        if controller is not None:
            ray.kill(controller)
        for group in placement_group_table().values():
            if group["name"] == self._ray_name and group["state"] != "REMOVED":
                remove_placement_group(ray.util.get_placement_group(self._ray_name))
        shutil.rmtree(self._storage_path / self._ray_name, ignore_errors=True)  # Ray Train's own marker file

    def _lost_message(self, error: Exception) -> str:
        return (
            f"run {self._name}: its workers failed {self._num_failures} time(s), and {self._max_failures} "
            f"restart(s) within an hour were allowed (`train: retries`). The last committed checkpoint is kept: "
            f"the run goes on from it when it is started again. Last failure: {error}"
        )
