"""The parts of Ray Train that we replace: its worker group, controller, policies, backend and trainer.

Stock Ray Train needs about 10 s on 2 cores from submit to the first step, nearly all of it processes that
import torch: the controller and each worker carry a runtime environment of their own, so Ray starts a fresh
process for each, and helper actors that a run of ours does not use take processes too. Here nobody carries
one (settings travel as arguments), the helpers are gone, and so every actor's process is a copy of the cluster's
template (`shoal.cluster.template`). `benchmarks/submit.py` measures it. `workers` runs them.

These are subclasses of private classes. ``tests/train/test_train_ray_edge.py`` fails, naming what to look at,
when an upgrade moves one of them. Unlike its siblings this module imports torch and ray at the top: it is
only imported to train on a cluster, and by the template so that its copies have nothing left to import.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
import ray._private.worker as ray_worker_module
import ray.train.v2._internal.execution.worker_group.state as worker_group_state_module
import ray.train.v2._internal.execution.worker_group.worker_group as worker_group_module
from ray.exceptions import RayActorError
from ray.train import FailureConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import ReplicaGroup, WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import (
    PollTask,
    WorkerGroupPollStatus,
    WorkerStatus,
)
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from shoal.capacity import Resources
from shoal.errors import PeerLost, ShoalError
from shoal.train.loss import OnLoss
from shoal.train.pulse import heart
from shoal.train.ray_watch import Watch
from shoal.train.rendezvous import Place, Rendezvous, places, run_in_generations, take_seat
from shoal.train.retries import Retries
from shoal.train.stall import OnStall

logger = logging.getLogger(__name__)

_REPLACE_S = 60.0
"""How long starting replacements may take before the controller gives up, and its driver starts all anew."""

_UNEVENTFUL_S = 0.8
"""How long a worker whose steps follow each other keeps the controller waiting for an answer. Each costs it a
millisecond; and while its main thread waits, Ray does not wake it 100 times a second to look for signals."""

_LATECOMERS_S = 0.05
"""How long the other workers may take to answer once one has."""

_RESCUE_S = 30.0
"""How long the survivors of a lost worker may take to commit the step boundary that they hold."""


class _Worker(RayTrainWorker):  # type: ignore[misc]
    """A worker that says more of itself whenever it is polled, and takes its time when there is nothing to say."""

    def poll_status(self) -> WorkerStatus:
        heart.wait_while_uneventful(_UNEVENTFUL_S)
        status = super().poll_status()
        status.pulse = heart.read()
        return status


@dataclass(frozen=True)
class _Room:
    """What a group needs to know that Ray Train does not pass on."""

    lent: PlacementGroup | None
    """Somebody else's placement group to use, instead of one of its own."""
    collective_timeout_s: float


class _Group(WorkerGroup):  # type: ignore[misc]  # Ray has no types
    """Workers without a runtime environment, in a placement group that can be found after a crash.

    They meet in a `Rendezvous` of this group's: one that died is replaced, and meets those that live.
    """

    room: ClassVar[_Room]
    """The controller sets it in its process."""

    watch: ClassVar[Watch]
    """The controller sets it, too."""

    _worker_cls = _Worker
    _worker_group_state: Any  # Ray Train's own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rendezvous = Rendezvous(ray.util.get_node_ip_address())
        self._places: list[Place] = []
        super().__init__(*args, **kwargs)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Mapping[str, Any]) -> dict[str, Any]:
        return dict(custom_runtime_env)

    def _init_train_context(self, workers: list[Any], sync_actor: Any) -> None:
        super()._init_train_context(workers, sync_actor)
        if not self._places:  # all of them; one that is replaced has the place of the one before it
            self._places = places([worker.metadata.node_id for worker in workers])
        resources = self._worker_group_context.resources_per_worker
        backend = "nccl" if resources.get("GPU") else "gloo"
        seats = [
            self._rendezvous.seat(
                self._places[worker.distributed_context.world_rank],
                backend=backend,
                timeout_s=self.room.collective_timeout_s,
            )
            for worker in workers
        ]
        ray.get([worker.execute_async(take_seat, seat) for worker, seat in zip(workers, seats, strict=True)])

    def meet(self, replaced: Iterable[int] | None = None) -> None:
        """Let the workers, who have all started, form a process group; ``replaced`` are new, or all of them."""
        self.watch.watchdog.begin_group(replaced)
        self._rendezvous.call()

    @property
    def has_all_its_room(self) -> bool:
        """Whether every worker's bundle of the placement group is where it was: no node of it is gone."""
        group = self.get_worker_group_state().placement_group_handle.placement_group
        return bool(placement_group_table(group)["state"] == "CREATED")

    def _replace_replica_group_impl(self, replica_group_index: int) -> None:
        """Put a new worker in the place of a dead one.

        Ray's own also asks every survivor to drop its reports, of which a run of ours has none, and waits without a
        deadline for the answer: one that hangs would hold up everything.
        """
        group = self._replica_groups[replica_group_index]
        (dead,) = group.get_workers()
        if group.is_active():
            ray.kill(dead.actor)
        self._world_rank_to_ongoing_poll.pop(replica_group_index, None)
        state, context = self._worker_group_state, self._worker_group_context
        (worker,) = self._create_workers(
            num_workers=1,
            placement_group=state.placement_group_handle.placement_group,
            resources_per_worker=context.resources_per_worker,
            placement_group_bundle_indices=[dead.placement_group_bundle_index],
            starting_world_rank=replica_group_index,
            world_size=len(self._replica_groups),
            replica_group_size=1,
        )
        self._worker_group_state = state.replace_workers([dead], [worker])
        replacement = ReplicaGroup([worker], context.resources_per_worker, [])
        self._replica_groups[replica_group_index] = replacement
        try:
            self._init_train_context([worker], state.sync_actor)
            replacement.start_training(context)
        except RayActorError as error:
            raise WorkerGroupStartupFailedError("a replacement died while it started") from error

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        status = super().poll_status(timeout)
        if any(not each.running and each.error is None for each in status.worker_statuses.values()):
            self._end_with_those_that_returned(status)
        self.watch.tell_of(_lost_in(status))
        self.watch.act(self.get_workers())
        return status

    def _end_with_those_that_returned(self, status: WorkerGroupPollStatus) -> None:
        """Nobody comes back to a group that has ended: who is lost now is not missed, and nobody waits for another.

        A worker returns when the run's record says how it ended, or that it goes on with another number.
        """
        self._rendezvous.close()
        for each in status.worker_statuses.values():
            error = getattr(each.error, "_base_exc", each.error)
            if isinstance(error, PeerLost | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError):
                each.error, each.running = None, False

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[WorkerStatus]:
        self._wait_for_first_answer()
        statuses: list[WorkerStatus] = super()._poll_workers_and_collect_errors(_LATECOMERS_S)
        self.watch.look(statuses)
        return statuses

    def _wait_for_first_answer(self) -> None:
        """Ask all workers, and block until one has answered or has died, which is known at once."""
        asked = self._get_poll_tasks()
        now = time.monotonic()
        for rank, task in enumerate(asked):  # or they would be asked again
            self._world_rank_to_ongoing_poll.setdefault(rank, PollTask(start_time=now, task=task))
        ray.wait(asked, num_returns=1, timeout=2 * _UNEVENTFUL_S)

    def shutdown(self) -> None:
        """Let survivors of a lost worker end by themselves first: they commit what they hold.

        One that hangs, too, is not waited for, neither here nor by Ray.
        """
        self._rendezvous.close()
        deadline = time.monotonic() + _RESCUE_S
        while self.has_started():
            statuses = self._poll_workers_and_collect_errors(None)
            running = {rank for rank, status in enumerate(statuses) if status.running}
            hopeless = {rank for rank in running if self.watch.watchdog.is_hopeless(rank)}
            if running == hopeless or time.monotonic() >= deadline:
                for rank in running:
                    ray.kill(self.get_workers()[rank].actor)
                break
            time.sleep(0.02)
        super().shutdown()

    def _create_placement_group(self, scaling_config: Any, context: Any) -> Any:
        if self.room.lent is not None:
            return _Lent(self.room.lent)
        return DefaultPlacementGroupHandle(
            placement_group(
                [context.resources_per_worker] * context.num_workers,
                strategy=context.placement_strategy,
                name=self._train_run_context.run_config.name,
            )
        )


def _lost_in(status: WorkerGroupPollStatus) -> dict[int, Exception]:
    """Which workers died or have lost all others, and why; their group fails by it."""
    errors = {
        rank: getattr(each.error, "_base_exc", each.error) for rank, each in status.worker_statuses.items()
    }
    return {
        rank: error
        for rank, error in errors.items()
        if isinstance(error, PeerLost | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
    }


class _Lent(DefaultPlacementGroupHandle):  # type: ignore[misc]
    """Somebody else's placement group: it is there already, and there when the workers start again."""

    def shutdown(self) -> None:
        """Leave it: the workers in it have been killed before this is called."""


class _NoBarrier:
    """In the place of the actor behind ``ray.train.report()``, which a run of ours never calls."""

    @classmethod
    def options(cls, **_: Any) -> type[_NoBarrier]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> _NoBarrier:
        return cls()


class _Controller(TrainController):  # type: ignore[misc]
    """Ray Train's control loop with our group; its settings are an argument, not a runtime environment."""

    worker_group_cls = _Group

    def __init__(
        self,
        *,
        environment: Mapping[str, str],
        room: _Room,
        on_stall: OnStall | None,
        on_loss: OnLoss | None,
        **kwargs: Any,
    ) -> None:
        # This process runs nothing else, so what is changed here concerns this run alone.
        os.environ.update(environment)
        worker_group_module.SynchronizationActor = _NoBarrier
        worker_group_state_module._shutdown_sync_actor = lambda _: None
        _Group.room = room
        _Group.watch = Watch(on_stall, lambda: self._failure_policy.retries.has_more, on_loss)
        super().__init__(**kwargs)

    def _start_worker_group(self, num_workers: int, resources_per_worker: Resources) -> None:
        super()._start_worker_group(num_workers, resources_per_worker)
        self._meet(None)

    def _replace_bad_workers(self, poll_status: Any) -> None:
        if not self._worker_group.has_all_its_room:  # what is left is granted anew
            self._shutdown_worker_group()
            self._start_worker_group(
                self._scaling_policy.scaling_config.num_workers,
                self._scaling_policy.scaling_config._resources_per_worker_not_none,
            )
            return
        # Where a node has just died, Ray waits for a process on it, and we with it: then all is made anew.
        deadline = threading.Timer(_REPLACE_S, os._exit, [1])
        deadline.daemon = True
        deadline.start()
        try:
            super()._replace_bad_workers(poll_status)
        finally:
            deadline.cancel()
        self._meet(poll_status.failing_replica_group_indices)

    def _meet(self, replaced: Iterable[int] | None) -> None:
        self._worker_group.meet(replaced)
        self._failure_policy.retries.started()

    async def _step(self) -> Any:
        pause_s, self._failure_policy.pause_s = self._failure_policy.pause_s, 0.0
        await asyncio.sleep(pause_s)
        return await super()._step()

    def num_failures(self) -> int:
        """How many times the group has failed so far."""
        return int(self._failure_policy.retries.num_failures)


class _RestartOnDeath(FailurePolicy):  # type: ignore[misc]
    """Start again when a worker dies, as often and as soon as `Retries` says; let errors with a meaning out.

    A `ShoalError` raised on a worker says what is wrong and would be raised again. Any other exception there
    is mostly a survivor that lost its peer in the middle of a collective.
    """

    def __init__(self, failure_config: FailureConfig) -> None:
        super().__init__(failure_config)
        self.retries = Retries(failure_config.max_failures)
        self.pause_s = 0.0
        """What the controller waits before it acts on the decision."""

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        if not is_worth_a_restart(training_failed_error):
            return FailureDecision.RAISE
        pause_s = self.retries.failed()
        if pause_s is None:
            return FailureDecision.RAISE
        self.pause_s = pause_s
        return FailureDecision.RETRY


def is_worth_a_restart(error: Exception) -> bool:
    """Whether a group that failed so may do better when it is started again."""
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, WorkerGroupStartupFailedError)
    if not isinstance(error, WorkerGroupError):
        return False
    failures = error.worker_failures.values()
    if any(
        isinstance(failure, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
        for failure in failures
    ):
        return True
    # A lost peer is no verdict on the run: one that hangs is noticed by the others, whose collective ends.
    return not any(
        isinstance(failure, ShoalError) and not isinstance(failure, PeerLost) for failure in failures
    )


def found_no_room(error: Exception) -> bool:
    """Whether a group failed because somebody else took the room that was granted to it."""
    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    )


class _FixedWorkers(ScalingPolicy):  # type: ignore[misc]
    """Always the granted number. Stock policies also start an AutoscalingCoordinator actor and ask it."""

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.num_workers)

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision:
        return ResizeDecision(
            num_workers=self.scaling_config.num_workers,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )

    def make_decision_for_running_worker_group(self, *_: Any, **__: Any) -> NoopDecision:
        return NoopDecision()

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register with nobody: capacity was granted, and a pending placement group scales a cluster up."""


class _Seated(TorchConfig):  # type: ignore[misc]
    """Tells Ray Train to replace the dead alone; the process group is ours, made in generations (`rendezvous`)."""

    @property
    def backend_cls(self) -> type[_SeatedBackend]:
        return _SeatedBackend


class _SeatedBackend(Backend):  # type: ignore[misc]
    has_replica_groups = True


class Trainer(TorchTrainer):  # type: ignore[misc]
    """`TorchTrainer` that hands its controller to ``watch`` instead of waiting for it.

    ``fn`` runs on every worker as in `rendezvous.run_in_generations`; ``environment`` is the controller's;
    ``lent`` a placement group for its workers, None to make one; ``collective_timeout_s`` torch.distributed's;
    ``on_stall`` is called in the controller's process of every worker that hangs, ``on_loss`` of those that died.
    """

    def __init__(
        self,
        fn: Callable[[dict[str, Any]], None],
        *,
        environment: Mapping[str, str],
        lent: PlacementGroup | None,
        collective_timeout_s: float,
        on_stall: OnStall | None,
        on_loss: OnLoss | None,
        watch: Callable[[Any], Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(functools.partial(run_in_generations, fn), torch_config=_Seated(), **kwargs)
        self._environment = environment
        self._room = _Room(lent, collective_timeout_s)
        self._on_stall, self._on_loss = on_stall, on_loss
        self._watch = watch

    def _create_default_callbacks(self) -> list[Any]:
        """None: seats do what the backend's does, and each worker keeps to the GPUs that Ray gave it."""
        return []

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["scaling_policy"] = _FixedWorkers(self.scaling_config)
        kwargs["failure_policy"] = _RestartOnDeath(self.run_config.failure_config)
        return self._watch(
            ray.remote(
                num_cpus=0,
                label_selector={ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
            )(_Controller).remote(
                environment=self._environment,
                room=self._room,
                on_stall=self._on_stall,
                on_loss=self._on_loss,
                **kwargs,
            )
        )


def keep_raylet_quiet() -> None:
    """Send "A worker died ..." (13 lines) to our log: Ray prints it whatever ``log_to_driver`` says.

    A run restarts such a worker and says so itself.
    """
    stock = ray_worker_module.print_to_stdstream
    if getattr(stock, "is_shoals", False):
        return

    def print_unless_raylet(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if data.get("pid") == "raylet":
            logger.debug("raylet: %s", data.get("lines"))
        else:
            stock(data, *args, **kwargs)

    print_unless_raylet.is_shoals = True  # type: ignore[attr-defined]
    ray_worker_module.print_to_stdstream = print_unless_raylet
