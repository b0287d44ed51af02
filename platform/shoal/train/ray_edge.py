"""The parts of Ray Train that we replace: its worker group, controller, policies, backend and trainer.

Stock Ray Train needs about 10 s on 2 cores from submit to the first step, nearly all of it processes that
import torch: the controller and each worker carry a runtime environment of their own, so Ray starts a fresh
process for each, and helper actors that a run of ours does not use take processes too. Here nobody carries
one (settings travel as arguments), the helpers are gone, and so every actor finds a warm process
(`shoal.cluster.warm`). `benchmarks/submit.py` measures it. `workers` runs them.

These are subclasses of private classes. ``tests/train/test_train_ray_edge.py`` fails, naming what to look at,
when an upgrade moves one of them. Unlike its siblings this module imports torch and ray at the top: it is
only imported to train on a cluster, and by waiting processes so that nothing is left to import.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import ray
import ray._private.worker as ray_worker_module
import ray.train.v2._internal.execution.worker_group.state as worker_group_state_module
import ray.train.v2._internal.execution.worker_group.worker_group as worker_group_module
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group

from shoal.capacity import Resources
from shoal.cluster.warm import add_warm_processes
from shoal.errors import PeerLost, ShoalError
from shoal.train.pulse import heart
from shoal.train.stacks import dump, dump_by_signal, place_of, stack_of
from shoal.train.stall import OnStall, StallReport
from shoal.train.watchdog import Stall, Watchdog, Why

logger = logging.getLogger(__name__)

_PAY_BACK_EVERY_S = 60.0
"""How long a group runs before a warm process that it took is replaced, and then the next; at the run's end, all
that are left. Each is 3.5 CPU-seconds of imports, which a run on every core feels (`shoal.cluster.preload`):
so a short run never pays, and a long one once. A new cluster has one to spare for a death before that."""

_RESCUE_S = 30.0
"""How long the survivors of a lost worker may take to commit the step boundary that they hold."""

_STACK_S = 1.0
"""How long a worker may take to say where it stands; the controller waits for it."""

_MAX_STACK = 20_000
"""Characters of stacks in a report; the logs have all."""


class _Worker(RayTrainWorker):  # type: ignore[misc]
    """A worker that says more of itself whenever it is polled."""

    def poll_status(self) -> WorkerStatus:
        status = super().poll_status()
        status.pulse = heart.read()
        return status


class _Watch:
    """Carries out what the watchdog decides: looks where a worker stands, says so, and has it replaced.

    Lives as long as the controller, over all groups.
    """

    def __init__(self, on_stall: OnStall | None, has_restart: Callable[[], bool]) -> None:
        self.watchdog = Watchdog()
        self._on_stall = on_stall
        self._has_restart = has_restart

    def look(self, statuses: list[WorkerStatus]) -> None:
        """Take in the answers of one poll. Of a worker that did not answer yet Ray makes one up, without a pulse."""
        answers = {
            rank: getattr(status, "pulse", None)
            for rank, status in enumerate(statuses)
            if status.error is None
        }
        self.watchdog.look(answers, time.monotonic())

    def act(self, workers: list[Any]) -> None:
        """End the worker that hangs, if one does: its group then fails as at any death.

        Blocks for `_STACK_S` at most, if none does for no time.
        """
        stall = self.watchdog.judge()
        if stall is None:
            return
        is_replaced = self._has_restart()
        stacks = _stacks_of(stall, workers)
        report = _report(stall, workers, stacks, is_replaced=is_replaced)
        logger.warning("%s", report)
        if self._on_stall is not None:
            try:
                self._on_stall(report)
            except Exception:  # a full disk, say: whatever it is, the worker hangs all the same
                logger.exception("could not record that a worker hangs: %s", report)
        if is_replaced:
            ray.kill(workers[stall.victim].actor)


def _stacks_of(stall: Stall, workers: list[Any]) -> dict[int, str]:
    """The stack of each rank's training thread as far as it can be had within `_STACK_S`, else why not."""
    if stall.why is Why.SILENT:
        (rank,) = stall.ranks
        where = workers[rank].metadata
        if where.node_id != ray.get_runtime_context().get_node_id():
            return {
                rank: f"(no stack: the process is on {where.hostname}, another machine than its controller's)"
            }
        found = {rank: dump_by_signal(where.pid, timeout_s=_STACK_S)}
    else:
        asked = {workers[rank].execute_async(dump): rank for rank in stall.ranks}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_STACK_S)
        found = {asked[ref]: _text(ref) for ref in done}
    return {
        rank: stack_of(text, stall.pulses[rank].thread if rank in stall.pulses else 0)
        if (text := found.get(rank))
        else "(no stack: the process did not react)"
        for rank in stall.ranks
    }


def _text(answer: Any) -> str:
    try:
        return str(ray.get(answer))
    except RayError:  # it died just now
        return ""


def _report(stall: Stall, workers: list[Any], stacks: dict[int, str], *, is_replaced: bool) -> StallReport:
    length = _MAX_STACK // len(stall.ranks)
    return StallReport(
        ranks=list(stall.ranks),
        pids=[workers[rank].metadata.pid for rank in stall.ranks],
        step=stall.steps,
        phase=stall.phase,
        seconds=round(stall.seconds, 1),
        why=stall.why.value,
        places=[place_of(stacks[rank]) for rank in stall.ranks],
        stack="\n\n".join(f"rank {rank}: {stacks[rank][:length]}" for rank in stall.ranks),
        replaced=is_replaced,
    )


class _Group(WorkerGroup):  # type: ignore[misc]  # Ray has no types
    """Workers without a runtime environment, in a placement group that can be found after a crash."""

    lent: ClassVar[PlacementGroup | None] = None
    """A placement group to use instead; the controller sets it in its process."""
    watch: ClassVar[_Watch]
    """The controller sets it, too."""
    _worker_cls = _Worker

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Mapping[str, Any]) -> dict[str, Any]:
        return dict(custom_runtime_env)

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        status = super().poll_status(timeout)
        self.watch.act(self.get_workers())
        return status

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[WorkerStatus]:
        statuses: list[WorkerStatus] = super()._poll_workers_and_collect_errors(timeout)
        self.watch.look(statuses)
        return statuses

    def shutdown(self) -> None:
        """Let survivors of a lost worker end by themselves first: they commit what they hold.

        One that hangs, too, is not waited for, neither here nor by Ray.
        """
        deadline = time.monotonic() + _RESCUE_S
        while self.has_started():
            statuses = self._poll_workers_and_collect_errors(timeout=0.2)
            running = {rank for rank, status in enumerate(statuses) if status.running}
            hopeless = {rank for rank in running if self.watch.watchdog.is_hopeless(rank)}
            if running == hopeless or time.monotonic() >= deadline:
                for rank in running:
                    ray.kill(self.get_workers()[rank].actor)
                break
            time.sleep(0.02)
        super().shutdown()

    def _create_placement_group(self, scaling_config: Any, context: Any) -> Any:
        if self.lent is not None:
            return _Lent(self.lent)
        return DefaultPlacementGroupHandle(
            placement_group(
                [context.resources_per_worker] * context.num_workers,
                strategy=context.placement_strategy,
                name=self._train_run_context.run_config.name,
            )
        )


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
    """Ray Train's control loop with our group; its settings are an argument, not a runtime environment.

    It also pays back the warm processes that a run takes: late and one by one, so that they hardly compete with
    it for the cores, but in time for most restarts.
    """

    worker_group_cls = _Group

    def __init__(
        self,
        *,
        environment: Mapping[str, str],
        lent: PlacementGroup | None,
        on_stall: OnStall | None,
        **kwargs: Any,
    ) -> None:
        # This process runs nothing else, so what is changed here concerns this run alone.
        os.environ.update(environment)
        worker_group_module.SynchronizationActor = _NoBarrier
        worker_group_state_module._shutdown_sync_actor = lambda _: None
        _Group.lent = lent
        _Group.watch = _Watch(on_stall, lambda: self._failure_policy.has_restart)
        self._num_warm_owed = 1  # this process
        super().__init__(**kwargs)

    def _start_worker_group(self, num_workers: int, resources_per_worker: Resources) -> None:
        _Group.watch.watchdog.begin_group()
        super()._start_worker_group(num_workers, resources_per_worker)
        self._num_warm_owed += num_workers
        asyncio.get_running_loop().call_later(_PAY_BACK_EVERY_S, self._pay_back_one)

    async def _shutdown(self) -> Any:
        result = await super()._shutdown()
        owed, self._num_warm_owed = self._num_warm_owed, 0
        if owed:
            add_warm_processes(owed)
        return result

    def _pay_back_one(self) -> None:
        if self._num_warm_owed:
            self._num_warm_owed -= 1
            add_warm_processes(1)
            asyncio.get_running_loop().call_later(_PAY_BACK_EVERY_S, self._pay_back_one)

    def num_failures(self) -> int:
        """How many times the group has failed so far."""
        return int(self._failure_policy.num_failures)


class _RestartOnDeath(FailurePolicy):  # type: ignore[misc]
    """Start the group again when a worker dies, up to ``max_failures`` times; let errors with a meaning out.

    A `ShoalError` raised on a worker says what is wrong and would be raised again. Any other exception there
    is mostly a survivor that lost its peer in the middle of a collective.
    """

    def __init__(self, failure_config: FailureConfig) -> None:
        super().__init__(failure_config)
        self.num_failures = 0

    @property
    def has_restart(self) -> bool:
        """Whether one more failure would be retried."""
        return bool(self.num_failures < self.failure_config.max_failures)

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        if not is_worth_a_restart(training_failed_error):
            return FailureDecision.RAISE
        self.num_failures += 1
        may_retry = self.num_failures <= self.failure_config.max_failures
        return FailureDecision.RETRY if may_retry else FailureDecision.RAISE


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


@dataclass
class ProcessGroup(TorchConfig):  # type: ignore[misc]
    """torch.distributed with a finite timeout, whose sockets stay on the node's own address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _ProcessGroupBackend


class _ProcessGroupBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        # Ray's own picks a port, lets it go and hopes; torch's store then listens on every interface.
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        address, port = worker_group.execute_single(
            0, _open_store, len(worker_group), backend_config.timeout_s
        )
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend, rank, len(worker_group), address, port, backend_config.timeout_s
                )
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Leave it: the processes end right after; a collective that lost its peer would be waited for."""


_store: Any = None  # rank 0 owns the store for as long as its process lives


def _open_store(world_size: int, timeout_s: float) -> tuple[str, int]:
    """On rank 0: open the rendezvous store on a free port of this node's address."""
    global _store
    address = ray.util.get_node_ip_address()
    listener = socket.create_server((address, 0), backlog=128)
    port = listener.getsockname()[1]
    _store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return address, port


def _join(backend: str, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """On every rank: say who we are in the usual variables, and join the process group."""
    timeout = timedelta(seconds=timeout_s)
    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )
    if address.startswith("127."):
        # Left alone, both bind what the host name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if (store := _store) is None:
        store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """`TorchTrainer` that hands its controller to ``watch`` instead of waiting for it.

    ``environment`` is the controller's; ``lent`` a placement group for its workers, None to make one; ``on_stall`` is
    called in the controller's process of every worker that hangs.
    """

    def __init__(
        self,
        *args: Any,
        environment: Mapping[str, str],
        lent: PlacementGroup | None,
        on_stall: OnStall | None,
        watch: Callable[[Any], Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._environment = environment
        self._lent = lent
        self._on_stall = on_stall
        self._watch = watch

    def _create_default_callbacks(self) -> list[Any]:
        return [
            AcceleratorSetupCallback(self.backend_config, self.scaling_config),
            BackendSetupCallback(self.backend_config),
        ]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["scaling_policy"] = _FixedWorkers(self.scaling_config)
        kwargs["failure_policy"] = _RestartOnDeath(self.run_config.failure_config)
        return self._watch(
            ray.remote(
                num_cpus=0,
                label_selector={ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
            )(_Controller).remote(
                environment=self._environment, lent=self._lent, on_stall=self._on_stall, **kwargs
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
