"""The edge to Ray Train: what it relies on, what it decides, and what it does on a real cluster."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shoal.config import Range
from shoal.errors import (
    DeadlineExceeded,
    PeerLost,
    RecipeError,
    RequestError,
    StorageError,
    SupersededError,
    WorkerLost,
)
from waiting import DEADLINE_S, wait_until

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO = Range(1, 1), Range(2, 2)
LOOK = "platform/shoal/train/ray_edge.py relies on it: see what replaced it in this version of Ray Train"

_V2 = "ray.train.v2._internal"
RELIED_ON: list[tuple[str, str, tuple[str, ...]]] = [
    # module, attribute, parameters that we pass or override
    (
        f"{_V2}.execution.controller",
        "TrainController.__init__",
        ("train_fn_ref", "scaling_policy", "failure_policy"),
    ),
    (f"{_V2}.execution.controller", "TrainController.worker_group_cls", ()),
    (
        f"{_V2}.execution.controller",
        "TrainController._start_worker_group",
        ("num_workers", "resources_per_worker"),
    ),
    (f"{_V2}.execution.controller", "TrainController._shutdown", ()),
    (f"{_V2}.execution.controller", "TrainController.run", ()),
    (f"{_V2}.execution.controller", "TrainController.abort", ()),
    (f"{_V2}.execution.controller", "TrainController.get_result", ()),
    (f"{_V2}.execution.worker_group", "WorkerGroup._get_worker_runtime_env", ("custom_runtime_env",)),
    (
        f"{_V2}.execution.worker_group",
        "WorkerGroup._create_placement_group",
        ("scaling_config", "worker_group_context"),
    ),
    (f"{_V2}.execution.worker_group.worker_group", "SynchronizationActor", ()),
    (f"{_V2}.execution.worker_group.state", "_shutdown_sync_actor", ("sync_actor",)),
    (f"{_V2}.execution.worker_group.placement_group_handle", "DefaultPlacementGroupHandle.__init__", ("pg",)),
    (f"{_V2}.execution.worker_group.placement_group_handle", "DefaultPlacementGroupHandle.shutdown", ()),
    (
        f"{_V2}.execution.worker_group",
        "WorkerGroup._create_workers",
        (
            "num_workers",
            "placement_group",
            "placement_group_bundle_indices",
            "starting_world_rank",
            "world_size",
            "replica_group_size",
        ),
    ),
    (f"{_V2}.execution.worker_group", "WorkerGroup._worker_cls", ()),
    (f"{_V2}.execution.worker_group", "WorkerGroup.poll_status", ("timeout",)),
    (f"{_V2}.execution.worker_group", "WorkerGroup._poll_workers_and_collect_errors", ("timeout",)),
    (f"{_V2}.execution.worker_group", "WorkerGroup._get_poll_tasks", ()),
    (f"{_V2}.execution.worker_group.poll", "PollTask.__init__", ("start_time", "task")),
    (f"{_V2}.execution.worker_group", "WorkerGroup.get_workers", ()),
    (f"{_V2}.execution.worker_group.poll", "WorkerStatus.__init__", ("running", "error")),
    (f"{_V2}.execution.worker_group.worker", "RayTrainWorker.poll_status", ()),
    (f"{_V2}.execution.worker_group.worker", "Worker.__init__", ("actor", "metadata")),
    (f"{_V2}.execution.worker_group.worker", "Worker.execute_async", ("fn",)),
    (f"{_V2}.execution.worker_group.worker", "ActorMetadata.__init__", ("hostname", "node_id", "pid")),
    (f"{_V2}.execution.failure_handling", "FailurePolicy.make_decision", ("training_failed_error",)),
    (f"{_V2}.execution.scaling_policy", "ScalingPolicy.make_decision_for_non_running_worker_group", ()),
    (f"{_V2}.execution.scaling_policy", "ScalingPolicy.make_decision_for_running_worker_group", ()),
    (f"{_V2}.execution.scaling_policy", "ScalingPolicy.after_controller_start", ("train_run_context",)),
    (f"{_V2}.execution.scaling_policy", "ScalingPolicy._cancel_resource_request", ()),
    (f"{_V2}.execution.scaling_policy", "ResizeDecision.__init__", ("num_workers", "resources_per_worker")),
    (f"{_V2}.execution.controller", "TrainController._replace_bad_workers", ("poll_status",)),
    (f"{_V2}.execution.controller", "TrainController._shutdown_worker_group", ()),
    (f"{_V2}.execution.worker_group.poll", "WorkerGroupPollStatus.failing_replica_group_indices", ()),
    (f"{_V2}.execution.worker_group", "WorkerGroup._init_train_context", ("workers", "sync_actor")),
    (
        f"{_V2}.execution.worker_group",
        "WorkerGroup._replace_replica_group_impl",
        ("replica_group_index",),
    ),
    (f"{_V2}.execution.worker_group", "WorkerGroup.get_worker_group_state", ()),
    (
        f"{_V2}.execution.worker_group",
        "ReplicaGroup.__init__",
        ("workers", "resources_per_worker", "callbacks"),
    ),
    (f"{_V2}.execution.worker_group", "ReplicaGroup.start_training", ("worker_group_context",)),
    (
        f"{_V2}.execution.worker_group.state",
        "WorkerGroupState.replace_workers",
        ("old_workers", "new_workers"),
    ),
    (f"{_V2}.execution.worker_group", "Worker.execute_async", ("fn",)),
    ("ray.train.backend", "Backend.has_replica_groups", ()),
    ("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer._initialize_and_run_controller", ()),
    ("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer._create_default_callbacks", ()),
    ("ray.train.v2.api.config", "ScalingConfig._resources_per_worker_not_none", ()),
    ("ray._private.worker", "print_to_stdstream", ("data",)),
]


@pytest.mark.parametrize(("module", "name", "parameters"), RELIED_ON, ids=lambda value: str(value)[-50:])
def test_ray_still_has_what_the_edge_relies_on(module: str, name: str, parameters: tuple[str, ...]) -> None:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module} has no {name}: {LOOK}"
        found = getattr(found, part)
    if parameters:
        has = inspect.signature(found).parameters
        assert set(parameters) <= set(has), f"{module}.{name} takes {list(has)}, we use {parameters}: {LOOK}"


def test_a_workers_status_still_carries_what_we_add_to_it() -> None:
    import pickle

    from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

    from shoal.train.pulse import heart

    status = WorkerStatus(running=True)
    assert not hasattr(status, "pulse"), f"what Ray makes up for one that does not answer has none: {LOOK}"
    status.pulse = heart.read()
    assert pickle.loads(pickle.dumps(status)).pulse == status.pulse, LOOK


# --- what it decides ----------------------------------------------------------------------------------------


def dead() -> Exception:
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("gone", failure=RayActorError())


def decisions(max_failures: int, *failures: Exception) -> list[str]:
    from ray.train import FailureConfig

    from shoal.train.ray_edge import _RestartOnDeath

    policy = _RestartOnDeath(FailureConfig(max_failures=max_failures))
    return [policy.make_decision(failure).value for failure in failures]


def on_workers(**failures: Exception) -> Exception:
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("failed", {int(rank[1:]): failure for rank, failure in failures.items()})


def test_a_dead_worker_is_worth_a_restart_until_they_are_used_up() -> None:
    assert decisions(2, *[on_workers(r1=dead())] * 3) == ["RETRY", "RETRY", "RAISE"]


def test_a_survivor_that_lost_its_peer_is_worth_a_restart() -> None:
    assert decisions(1, on_workers(r0=RuntimeError("connection closed by peer"))) == ["RETRY"]


def test_a_peer_that_hangs_is_worth_a_restart() -> None:
    assert decisions(1, on_workers(r0=PeerLost("a worker stopped answering"))) == ["RETRY"]


def test_an_error_with_a_meaning_is_not_tried_again() -> None:
    assert decisions(5, on_workers(r0=RuntimeError("peer"), r1=RecipeError("NaN"))) == ["RAISE"]


def test_one_that_was_superseded_is_the_verdict_and_not_the_peers_that_lost_it() -> None:
    from shoal.train.workers import _verdict

    lost, superseded = PeerLost("a worker stopped answering"), SupersededError("taken over")
    failed = on_workers(r0=lost, r1=superseded)
    assert decisions(5, failed) == ["RAISE"]
    assert _verdict(failed) is superseded
    assert _verdict(on_workers(r0=lost, r1=RuntimeError("x"), r2=(disk := StorageError("full")))) is disk
    assert _verdict(on_workers(r0=lost)) is None, "another start may help"


def test_an_error_that_a_death_brought_about_is_tried_again() -> None:
    assert decisions(5, on_workers(r0=RecipeError("in backward"), r1=dead())) == ["RETRY"]


def test_no_room_goes_back_to_whoever_grants_it() -> None:
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    )
    from ray.train.v2.api.exceptions import ControllerError

    assert decisions(5, ControllerError(WorkerGroupStartupTimeoutError(2))) == ["RAISE"]
    assert decisions(5, ControllerError(WorkerGroupStartupFailedError("died at birth"))) == ["RETRY"]


class ElsewhereWorker:
    """A worker on another machine, as far as the watch looks at it."""

    def __init__(self, rank: int) -> None:
        from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata

        self.actor = f"actor {rank}"
        self.metadata = ActorMetadata("far-away", "another node", "10.0.0.2", 4711, {})


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The actors that were killed, on a machine without Ray."""
    from types import SimpleNamespace

    from shoal.train import ray_watch

    found: list[str] = []
    here = SimpleNamespace(get_node_id=lambda: "this node")
    monkeypatch.setattr(ray_watch.ray, "kill", found.append)
    monkeypatch.setattr(ray_watch.ray, "get_runtime_context", lambda: here)
    return found


def watch_a_silent_rank(on_stall: Any, *, has_restart: bool) -> None:
    from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

    from shoal.train.pulse import Pulse
    from shoal.train.ray_watch import Watch

    watch = Watch(on_stall, lambda: has_restart)
    answered = WorkerStatus(running=True)
    answered.pulse = Pulse("step", 40, 0.0, True, 0.002, 0)
    watch.look([answered, answered])
    for now in range(10):
        watch.watchdog.look({0: answered.pulse, 1: None}, 1e9 + now)  # on the test's clock, far ahead
        watch.act([ElsewhereWorker(0), ElsewhereWorker(1)])


def test_a_silent_worker_of_another_machine_is_replaced_without_a_stack(killed: list[str]) -> None:
    reports: list[Any] = []
    watch_a_silent_rank(reports.append, has_restart=True)
    (report,) = reports
    assert (report.ranks, report.pids, report.step, report.replaced) == ([1], [4711], 40, True)
    assert "far-away, another machine" in report.stack
    assert killed == ["actor 1"]


def test_a_hang_that_cannot_be_recorded_is_ended_all_the_same(
    killed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(report: Any) -> None:
        raise OSError("the disk is full")

    watch_a_silent_rank(fail, has_restart=True)
    assert killed == ["actor 1"]
    assert "the disk is full" in caplog.text


def test_who_died_is_told_once_and_survivors_and_those_with_an_error_of_their_own_are_not() -> None:
    from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

    from shoal.train.pulse import Pulse
    from shoal.train.ray_edge import _lost_in
    from shoal.train.ray_watch import Watch

    reports: list[Any] = []
    watch = Watch(None, lambda: True, reports.append)
    alive = WorkerStatus(running=True)
    alive.pulse = Pulse("step", 40, 0.0, True, 0.002, 0)
    watch.look([alive, alive, alive])
    watch.tell_of({})
    raised = WorkerStatus(running=False, error=RecipeError("a bad shape"))
    gone = WorkerStatus(running=False, error=dead())
    watch.tell_of(_lost_in(WorkerGroupPollStatus(worker_statuses={0: alive, 1: gone, 2: raised})))
    (report,) = reports
    assert (report.ranks, report.step) == ([1], 40)


def test_without_a_restart_left_nothing_is_killed(killed: list[str]) -> None:
    reports: list[Any] = []
    watch_a_silent_rank(reports.append, has_restart=False)
    assert [report.replaced for report in reports] == [False]
    assert killed == []


def test_what_ray_makes_up_for_a_silent_worker_is_no_answer_and_a_dead_one_is_none() -> None:
    from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

    from shoal.train.ray_watch import Watch

    seen: list[Any] = []
    watch = Watch(None, lambda: True)
    watch.watchdog.look = lambda answers, now: seen.append(answers)  # type: ignore[method-assign]
    watch.look([WorkerStatus(running=True), WorkerStatus(running=False, error=dead())])
    assert seen == [{0: None}]


# --- what it does -------------------------------------------------------------------------------------------


@pytest.fixture
def workers(cluster: ClusterInfo, tmp_path: Path) -> Callable[..., Any]:
    from ray import cloudpickle

    import edge_loads
    from shoal.train.workers import Workers

    cloudpickle.register_pickle_by_value(edge_loads)  # this folder is on pytest's path, not on the workers'

    def build(load: str, workers: Range | Callable[[], Range] = TWO, **options: Any) -> Workers:
        return Workers(
            getattr(edge_loads, load),
            {"notes": str(tmp_path)},
            name="tested",
            workers=workers if callable(workers) else lambda: workers,
            resources_per_worker={"CPU": 1},
            storage_path=tmp_path,
            **{"max_failures": 2, **options},
        )

    return build


@pytest.fixture
def nothing_left(cluster: ClusterInfo) -> Iterator[None]:
    """After the test no placement group remains, and every CPU that was free is free again."""
    import ray

    free = ray.available_resources().get("CPU")
    yield
    from ray.util.placement_group import placement_group_table

    assert [group for group in placement_group_table().values() if group["state"] != "REMOVED"] == []
    wait_until(lambda: ray.available_resources().get("CPU") == free, f"{free} CPUs are free")


def notes(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class InThread(threading.Thread):
    """Runs a group beside the test and keeps its error."""

    def __init__(self, group: Any) -> None:
        super().__init__(daemon=True)
        self.group = group
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.group.run()
        except BaseException as error:
            self.error = error


@pytest.mark.cluster
@pytest.mark.usefixtures("nothing_left")
class TestOnACluster:
    def test_workers_reduce_together_and_listen_on_loopback_only(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        workers("sum_ranks", Range(3, 3)).run()
        for rank in range(3):
            (line,) = notes(tmp_path, rank)
            assert (line["total"], line["backend"], line["world"]) == (3.0, "gloo", 3)
            assert line["local_rank"] == str(rank)
            assert {address.removeprefix("::ffff:") for address in line["listens"]} == {"127.0.0.1"}

    def test_a_run_beside_an_app_takes_what_is_free(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        import ray

        @ray.remote(num_cpus=3)
        class App:
            def ready(self) -> bool:
                return True

        replica = App.remote()
        ray.get(replica.ready.remote())
        wait_until(lambda: ray.available_resources().get("CPU") == 1, "the app's CPUs are taken")
        workers("sum_ranks", Range(1, 3)).run()
        assert [line["world"] for line in notes(tmp_path, 0)] == [1]
        with pytest.raises(DeadlineExceeded, match="1 of 4 CPU"):
            workers("sum_ranks", Range(2, 3), grant_wait_s=0.5).run()
        ray.kill(replica)

    def test_more_workers_than_can_ever_be_is_refused(self, workers: Callable[..., Any]) -> None:
        with pytest.raises(RequestError, match="9 workers"):
            workers("sum_ranks", Range(9, 9)).run()

    def test_room_taken_by_somebody_else_is_granted_anew(
        self, workers: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from shoal.train import workers as room

        grants = itertools.chain([9], itertools.repeat(1))  # 9 were never free
        monkeypatch.setattr(room, "wait_for_grant", lambda *_, **__: next(grants))
        workers("sum_ranks", ONE, start_timeout_s=1.0).run()
        assert [line["world"] for line in notes(tmp_path, 0)] == [1]

    def test_a_group_that_ended_may_run_again_and_is_asked_how_many(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        wanted = Range(2, 2)
        group = workers("sum_ranks", lambda: wanted)  # asked at every look, as long as room is not free
        group.run()
        wanted = Range(1, 3)
        group.run(hold_out_s=DEADLINE_S)
        assert [line["world"] for line in notes(tmp_path, 0)] == [2, 3], "it waits for its own room"

    def test_workers_whose_room_was_taken_while_they_restart_go_on_with_fewer(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        import ray

        @ray.remote(num_cpus=3)
        class App:
            def ready(self) -> bool:
                return True

        group = workers("step_until_told", Range(1, 3), start_timeout_s=1.0)
        thread = InThread(group)
        wait_until(lambda: bool(notes(tmp_path, 2)), "the workers run")
        replica = App.remote()  # one CPU is free: it waits for the workers'
        ray.kill(group._controller)  # a worker's death would leave them their room
        ray.get(replica.ready.remote(), timeout=DEADLINE_S)
        wait_until(lambda: len(notes(tmp_path, 0)) == 2, "the group runs again")
        (tmp_path / "finish").touch()
        thread.join(DEADLINE_S)
        assert (thread.is_alive(), thread.error) == (False, None)
        assert [len(notes(tmp_path, rank)) for rank in range(3)] == [2, 1, 1]
        ray.kill(replica)

    def test_an_error_of_a_recipe_comes_out_as_it_is_and_at_once(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        began = time.monotonic()
        with pytest.raises(RecipeError, match="the loss is NaN") as caught:
            workers("refuse").run()
        assert time.monotonic() - began < 20  # rank 0 waits for no other group: `_RESCUE_S` is longer
        assert caught.value.traceback_text == "in the recipe"
        assert len(notes(tmp_path, 1)) == 1

    def test_failing_too_often_is_worker_lost(self, workers: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(WorkerLost, match=r"(?s)failed 1 time\(s\), and 0 restart\(s\).*no such thing"):
            workers("stumble", ONE, max_failures=0).run()
        assert len(notes(tmp_path, 0)) == 1

    def test_a_killed_worker_is_replaced_and_nothing_is_printed(
        self, workers: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        thread = InThread(workers("step_until_told"))
        wait_until(lambda: bool(notes(tmp_path, 1)), "the workers run")
        os.kill(notes(tmp_path, 1)[0]["pid"], signal.SIGKILL)
        wait_until(lambda: len(notes(tmp_path, 0)) == 2, "the group runs again")
        (tmp_path / "finish").touch()
        thread.join(DEADLINE_S)
        assert (thread.is_alive(), thread.error) == (False, None)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("killed", [0, 1])
    def test_who_lost_a_peer_keeps_its_process_and_meets_the_replacement(
        self, workers: Callable[..., Any], tmp_path: Path, killed: int
    ) -> None:
        def started() -> list[int]:
            return [len(notes(tmp_path, rank)) for rank in range(3)]

        thread = InThread(workers("step_with_peers", Range(3, 3)))
        for attempt in (1, 2):  # twice: the replaced one can lose a peer, too
            wait_until(lambda attempt=attempt: started() == [attempt] * 3, "all run")
            os.kill(notes(tmp_path, killed)[-1]["pid"], signal.SIGKILL)
        wait_until(lambda: started() == [3] * 3, "all run again")
        (tmp_path / "finish").touch()
        thread.join(DEADLINE_S)
        assert (thread.is_alive(), thread.error) == (False, None)
        for rank in range(3):
            assert len({line["pid"] for line in notes(tmp_path, rank)}) == (3 if rank == killed else 1)
            assert {line["local_rank"] for line in notes(tmp_path, rank)} == {str(rank)}

    def test_when_all_lost_each_other_the_group_is_made_anew(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        with pytest.raises(WorkerLost, match=r"failed 2 time\(s\), and 1 restart\(s\)"):
            workers("lose_peers", max_failures=1).run()
        assert [len(notes(tmp_path, rank)) for rank in range(2)] == [2, 2]

    def test_a_death_after_another_has_returned_is_not_missed(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        group = workers("die_late")
        thread = InThread(group)
        wait_until(lambda: notes(tmp_path, 0) and notes(tmp_path, 1), "both are there")
        (tmp_path / "die").touch()
        thread.join(DEADLINE_S)
        assert (thread.is_alive(), thread.error) == (False, None)
        assert [len(notes(tmp_path, rank)) for rank in range(2)] == [1, 1]

    def test_a_killed_controller_is_replaced(self, workers: Callable[..., Any], tmp_path: Path) -> None:
        import ray

        group = workers("step_until_told", ONE)
        thread = InThread(group)
        wait_until(lambda: bool(notes(tmp_path, 0)), "the worker runs")
        ray.kill(group._controller)
        wait_until(lambda: len(notes(tmp_path, 0)) == 2, "the group runs again")
        (tmp_path / "finish").touch()
        thread.join(DEADLINE_S)
        assert (thread.is_alive(), thread.error) == (False, None)

    def test_workers_start_again_in_room_that_was_lent_and_leave_it(
        self, workers: Callable[..., Any], tmp_path: Path
    ) -> None:
        import ray
        from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

        room = placement_group([{"CPU": 2}, {"CPU": 2}])  # every CPU: the workers find no other room
        ray.get(room.ready(), timeout=30)
        thread = InThread(workers("step_until_told", placement_group=room))
        wait_until(lambda: bool(notes(tmp_path, 1)), "the workers run")
        os.kill(notes(tmp_path, 1)[0]["pid"], signal.SIGKILL)
        wait_until(lambda: len(notes(tmp_path, 0)) == 2, "the group runs again")
        (tmp_path / "finish").touch()
        thread.join(30)
        assert (thread.is_alive(), thread.error) == (False, None)
        (group,) = (group for group in placement_group_table().values() if group["state"] != "REMOVED")
        assert (group["placement_group_id"], group["state"]) == (room.id.hex(), "CREATED")
        remove_placement_group(room)

    def test_abort_while_running_returns_quietly(self, workers: Callable[..., Any], tmp_path: Path) -> None:
        group = workers("step_until_told", ONE)
        thread = InThread(group)
        wait_until(lambda: bool(notes(tmp_path, 0)), "the worker runs")
        group.abort()
        group.abort()
        thread.join(DEADLINE_S)
        assert (thread.is_alive(), thread.error) == (False, None)

    def test_abort_at_any_moment_of_the_start_leaves_nothing(self, workers: Callable[..., Any]) -> None:
        group = workers("step_until_told", ONE)
        group.abort()
        group.run()
        group = workers("step_until_told", ONE)
        thread = InThread(group)
        wait_until(lambda: group._controller is not None, "there is a controller")
        group.abort()
        thread.join(DEADLINE_S)
        assert (thread.is_alive(), thread.error) == (False, None)


def test_importing_capacity_loads_no_ray() -> None:
    import subprocess

    code = "import shoal.capacity, sys; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
