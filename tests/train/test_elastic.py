"""The driver's part in a resize: what it orders, what it starts again, and what ends it. No Ray, no torch."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.capacity.elastic import LOOKS
from shoal.config import Range
from shoal.errors import (
    ClusterError,
    DeadlineExceeded,
    RequestError,
    StorageError,
    SupersededError,
    WorkerLost,
)
from shoal.storage import FileLock, Storage
from shoal.tracking import RunRecord, RunState, Wish
from shoal.train import driver as drivers
from shoal.train import resize as resizing
from shoal.train.driver import WorkersDriver
from shoal.train.elastic import Elastic, looking
from shoal.train.run import Run
from shoal.train.spec import RunSpec
from toy import Toy
from waiting import DEADLINE_S, wait_until


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    record = RunRecord(Storage(tmp_path), "run")
    record.claim_identity({"recipe": "a:B"})
    return record


def begin(record: RunRecord, workers: int, step: int = 0) -> None:
    record.append("start", workers=workers, pids=[], host="here", step=step, target_steps=100, source="fresh")


def leave(record: RunRecord, step: int, before: int, planned: int) -> None:
    record.append("resize", step=step, **{"from": before, "to": planned})


class Cluster:
    """Says how much room is free, and how often it was asked."""

    def __init__(self, free: float = 0) -> None:
        self.free = free
        self.num_looks = 0

    def free_room(self) -> float:
        self.num_looks += 1
        if self.free < 0:
            raise ClusterError("it does not answer")
        return self.free


def elastic_of(record: RunRecord, workers: Range, cluster: Cluster, *, most: int = 8) -> Elastic:
    elastic = Elastic(record, Wish(workers=workers, most=most, per_worker={"CPU": 1.0}), cluster.free_room)
    elastic.begin()
    return elastic


def ask(record: RunRecord, workers: Range) -> None:
    wish = record.resizing.wish()
    assert wish is not None
    record.resizing.ask(replace(wish, workers=workers))


# --- what it orders


def test_fewer_workers_are_ordered_at_the_first_look_without_asking_for_room(record: RunRecord) -> None:
    cluster = Cluster(free=9)
    elastic = elastic_of(record, Range(3, 3), cluster)
    begin(record, 3)
    elastic.look()
    assert record.resizing.ordered(1) is None
    ask(record, Range(1, 1))
    elastic.look()
    assert record.resizing.ordered(1) == 1
    assert cluster.num_looks == 0


def test_more_workers_are_ordered_when_room_stayed_free(record: RunRecord) -> None:
    elastic = elastic_of(record, Range(1, 4), Cluster(free=2))
    begin(record, 1)
    for _ in range(LOOKS - 1):
        elastic.look()
        assert record.resizing.ordered(1) is None
    elastic.look()
    assert record.resizing.ordered(1) == 3


def test_an_order_is_taken_back_when_the_room_is_gone(record: RunRecord) -> None:
    cluster = Cluster(free=2)
    elastic = elastic_of(record, Range(1, 4), cluster)
    begin(record, 1)
    for _ in range(LOOKS):
        elastic.look()
    assert record.resizing.ordered(1) == 3
    cluster.free = 0
    elastic.look()
    assert record.resizing.ordered(1) is None


def test_an_order_is_replaced_when_another_number_is_wished(record: RunRecord) -> None:
    elastic = elastic_of(record, Range(3, 3), Cluster())
    begin(record, 3)
    for wished in (1, 2):
        ask(record, Range(wished, wished))
        elastic.look()
        assert record.resizing.ordered(1) == wished


def test_never_more_than_the_run_can_have(record: RunRecord) -> None:
    elastic = elastic_of(record, Range(1, 9), Cluster(free=20), most=2)
    begin(record, 1)
    assert elastic.wanted() == Range(1, 2)
    for _ in range(LOOKS):
        elastic.look()
    assert record.resizing.ordered(1) == 2


def test_workers_that_started_again_by_themselves_are_ordered_anew(record: RunRecord) -> None:
    elastic = elastic_of(record, Range(2, 2), Cluster())
    begin(record, 2)
    ask(record, Range(1, 1))
    elastic.look()
    begin(record, 2)  # one died before the order was seen
    assert record.resizing.ordered(2) is None
    elastic.look()
    assert record.resizing.ordered(2) == 1


def test_room_that_somebody_else_took_is_not_grabbed_for_again_at_once(record: RunRecord) -> None:
    elastic = elastic_of(record, Range(1, 2), Cluster(free=1))
    begin(record, 1)
    for _ in range(LOOKS):
        elastic.look()
    leave(record, 5, 1, 2)
    begin(record, 1, step=5)
    for _ in range(2 * LOOKS - 1):
        elastic.look()
    assert record.resizing.ordered(2) is None
    elastic.look()
    assert record.resizing.ordered(2) == 2


def test_nothing_is_ordered_while_nobody_trains(record: RunRecord) -> None:
    begin(record, 3)  # by the driver before, which was killed on the way to 2
    leave(record, 5, 3, 2)
    elastic = elastic_of(record, Range(1, 1), Cluster())
    assert elastic.wanted() == Range(1, 1), "a start says its own number"
    assert not elastic.is_between()
    elastic.look()
    begin(record, 3, step=5)
    leave(record, 6, 3, 1)
    assert elastic.is_between()
    elastic.look()
    begin(record, 3, step=6)
    record.append_end(RunState.STOPPED, step=7)
    elastic.look()
    assert not any(record.resizing.ordered(attempt) for attempt in range(1, 5))


def test_on_the_way_it_wants_what_was_planned_and_will_do_with_what_it_had(record: RunRecord) -> None:
    elastic = elastic_of(record, Range(1, 1), Cluster())
    begin(record, 1)
    ask(record, Range(3, 3))
    leave(record, 5, 1, 3)
    assert elastic.wanted() == Range(1, 3)
    begin(record, 3, step=5)
    assert elastic.wanted() == Range(3, 3), "what is lost from now on is replaced by what is wished"
    ask(record, Range(7, 7))
    assert elastic.wanted() == Range(3, 7), "a wish that waits for room is no reason to end"


def test_a_wish_that_cannot_be_read_changes_nothing(
    record: RunRecord, caplog: pytest.LogCaptureFixture
) -> None:
    elastic = elastic_of(record, Range(2, 2), Cluster())
    begin(record, 2)
    (record.dir / "workers.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        elastic.look()
        elastic.look()
    assert elastic.wanted() == Range(2, 2)
    assert record.resizing.ordered(1) is None
    assert caplog.text.count("2 workers are wished as before") == 1


def test_a_look_that_fails_is_tried_again(record: RunRecord) -> None:
    cluster = Cluster(free=-1)
    elastic = elastic_of(record, Range(1, 2), cluster)
    begin(record, 1)
    with looking(elastic.look, every_s=0.001):
        wait_until(lambda: cluster.num_looks >= 2, "it looks again")
        cluster.free = 1
        wait_until(lambda: record.resizing.ordered(1) == 2, "it orders")


# --- what it starts again


class Played:
    """In the place of `workers.Workers`: each run is a scene of the test's."""

    def __init__(self) -> None:
        self.scenes: list[Callable[[], None]] = []
        self.held_out_s: list[float] = []
        self.wanted: list[Range] = []
        self.was_aborted = threading.Event()
        self.has_room = True

    def __call__(self, *_: Any, workers: Callable[[], Range], **__: Any) -> Played:
        self._workers = workers
        return self

    def run(self, *, hold_out_s: float = 0.0) -> None:
        self.held_out_s.append(hold_out_s)
        self.wanted.append(self._workers())
        self.scenes.pop(0)()

    def abort(self) -> None:
        self.was_aborted.set()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Played:
    group = Played()
    monkeypatch.setitem(sys.modules, "shoal.train.workers", SimpleNamespace(Workers=group))  # type: ignore[arg-type]
    monkeypatch.setattr(drivers, "looking", partial(looking, every_s=0.01))
    monkeypatch.setattr(drivers, "snapshot", lambda: SimpleNamespace(nodes=()))
    return group


def driver_of(record: RunRecord, tmp_path: Path, workers: Range, **options: Any) -> WorkersDriver:
    spec = RunSpec(recipe=Toy(), name="run", storage=Storage(tmp_path), target_steps=100)
    return WorkersDriver(spec, record, workers, {"CPU": 1}, 0, **options)


def run_to_end(driver: WorkersDriver, failure: type[Exception] | None = None) -> None:
    driver.start()
    wait_until(lambda: not driver.is_alive(), "the driver has ended")
    assert type(driver.failure()) is (failure or type(None)), "what a scene asserted"


def test_workers_that_left_for_another_number_start_again_with_it(
    record: RunRecord, group: Played, tmp_path: Path
) -> None:
    driver = driver_of(record, tmp_path, Range(2, 2))

    def first() -> None:
        begin(record, 2)
        ask(record, Range(1, 1))
        wait_until(lambda: record.resizing.ordered(1) == 1, "it is ordered")
        leave(record, 40, 2, 1)

    def second() -> None:
        begin(record, 1, step=40)
        record.append_end(RunState.FINISHED, step=100)

    group.scenes = [first, second]
    run_to_end(driver)
    assert group.wanted == [Range(2, 2), Range(1, 1)]
    assert group.held_out_s == [0.0, drivers.HOLD_OUT_S], "its own room is free a moment later"
    assert record.state() is RunState.FINISHED


@pytest.mark.parametrize("end", [WorkerLost("died too often"), SupersededError("taken over"), None])
def test_a_driver_that_was_superseded_writes_nothing_more(
    record: RunRecord, group: Played, tmp_path: Path, end: Exception | None
) -> None:
    """However its workers end, and whether they have seen it themselves."""
    told: list[Any] = []

    def first() -> None:
        begin(record, 2)
        leave(record, 40, 2, 1)
        record.fence.take()  # another driver, which holds another lock, or none
        record.mark_stop()
        told.extend(record.events())
        if end is not None:
            raise end

    group.scenes = [first]
    driver = driver_of(record, tmp_path, Range(2, 2))
    run_to_end(driver, SupersededError)
    assert record.events() == told
    theirs = RunRecord(Storage(tmp_path), "run")
    theirs.append_end(RunState.FAILED, step=50, failure=StorageError("the other one's"))
    with pytest.raises(SupersededError):
        Run(record, driver=driver).wait(progress=False)


def test_stop_beats_resize(record: RunRecord, group: Played, tmp_path: Path) -> None:
    def first() -> None:
        begin(record, 2)
        record.mark_stop()
        leave(record, 40, 2, 1)

    group.scenes = [first]
    run_to_end(driver_of(record, tmp_path, Range(2, 2)))
    assert (record.state(), record.step) == (RunState.STOPPED, 40)


def test_a_run_that_waits_for_room_on_the_way_is_stopped_at_once(
    record: RunRecord, group: Played, tmp_path: Path
) -> None:
    def first() -> None:
        begin(record, 2)
        leave(record, 40, 2, 3)

    def second() -> None:
        record.mark_stop()  # from any process
        assert group.was_aborted.wait(DEADLINE_S)

    group.scenes = [first, second]
    run_to_end(driver_of(record, tmp_path, Range(2, 3)))
    assert (record.state(), record.step) == (RunState.STOPPED, 40)


def test_aborted_on_the_way_it_is_interrupted(record: RunRecord, group: Played, tmp_path: Path) -> None:
    driver = driver_of(record, tmp_path, Range(2, 2))

    def first() -> None:
        begin(record, 2)
        leave(record, 40, 2, 1)
        driver._aborted = True

    group.scenes = [first]
    run_to_end(driver)
    assert record.state() is RunState.INTERRUPTED


def test_no_room_on_the_way_is_a_failure_that_is_recorded(
    record: RunRecord, group: Played, tmp_path: Path
) -> None:
    def first() -> None:
        begin(record, 2)
        leave(record, 40, 2, 1)

    def second() -> None:
        raise DeadlineExceeded("no room for 1 worker(s)")

    group.scenes = [first, second]
    run_to_end(driver_of(record, tmp_path, Range(2, 2)), DeadlineExceeded)
    assert (record.state(), record.step) == (RunState.FAILED, 40)


def test_workers_in_room_that_was_lent_keep_their_number(
    record: RunRecord, group: Played, tmp_path: Path
) -> None:
    elastic_of(record, Range(2, 2), Cluster())  # what an earlier driver left

    def only() -> None:
        begin(record, 2)
        assert record.resizing.wish() is None
        with pytest.raises(RequestError, match="keeps the workers it was started with"):
            Run(record).resize(1)
        leave(record, 40, 2, 1)  # nobody orders it; if it were there, nobody would follow

    group.scenes = [only]
    run_to_end(driver_of(record, tmp_path, Range(2, 2), placement_group=object()))
    assert group.scenes == []
    assert group.wanted == [Range(2, 2)]


# --- what is refused, changing nothing


@pytest.fixture
def driven(record: RunRecord) -> Any:
    """The record of a run with 2 workers whose driver lives here."""
    with FileLock(record.driver_lock_path):
        elastic_of(record, Range(1, 4), Cluster(), most=6)
        begin(record, 2)
        yield record


def refused(record: RunRecord, workers: Any) -> str:
    before = record.resizing.wish()
    with pytest.raises(RequestError) as caught:
        Run(record).resize(workers)
    assert record.resizing.wish() == before
    return str(caught.value)


@pytest.mark.parametrize(("workers", "meant"), [(3, Range(3, 3)), ("2..6", Range(2, 6)), ("1", Range(1, 1))])
def test_what_was_asked_is_what_is_wished(driven: RunRecord, workers: Any, meant: Range) -> None:
    Run(RunRecord(driven._storage, driven.name)).resize(workers)
    wish = driven.resizing.wish()
    assert wish == Wish(workers=meant, most=6, per_worker={"CPU": 1.0})


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, None, "0..2", "4..1", "many", ""])
def test_no_number_of_workers_is_refused(driven: RunRecord, workers: Any) -> None:
    assert f"workers={workers!r}: at least 1 worker" in refused(driven, workers)


@pytest.mark.parametrize("workers", [7, "1..7"])
def test_more_than_the_batch_has_samples_is_refused(driven: RunRecord, workers: Any) -> None:
    assert refused(driven, workers) == (
        f"workers={workers}: a batch of run 'run' has 6 samples, and no more workers can share it; ask for 1 to 6"
    )


def test_more_than_the_shards_of_an_exact_run_is_refused(tmp_path: Path) -> None:
    record = RunRecord(Storage(tmp_path), "exact")
    record.claim_identity({"recipe": "a:B", "exact": True, "shards": 4})
    with FileLock(record.driver_lock_path):
        elastic_of(record, Range(1, 1), Cluster(), most=4)
        assert "is exact and has 4 shards, and no more workers can share them; ask for 1 to 4" in refused(
            record, 5
        )


def test_a_run_that_is_not_trained_is_refused_with_what_starts_it(record: RunRecord) -> None:
    elastic_of(record, Range(1, 4), Cluster())
    begin(record, 2)
    assert refused(record, 3) == (
        "run 'run' is not being trained (interrupted at step 0): start it with so many workers: "
        "workers='3' (--workers 3)"
    )


def test_a_run_under_torchrun_is_refused(record: RunRecord) -> None:
    elastic_of(record, Range(1, 4), Cluster())  # what an earlier driver left
    begin(record, 2)
    with FileLock(record.lock_path):
        assert "torchrun's --nproc-per-node decides" in refused(record, 3)


def test_a_trial_is_refused(record: RunRecord) -> None:
    record.claim_trial("sweep-1", 7)
    begin(record, 2)
    with FileLock(record.driver_lock_path):
        assert "it is trial 7 of sweep 'sweep-1'" in refused(record, 3)


def test_more_than_can_ever_fit_into_the_cluster_is_refused(
    driven: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoal.capacity import NodeFree, Snapshot

    seen = Snapshot(nodes=(NodeFree(name="n", total={"CPU": 4}, free={"CPU": 0}),))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))  # type: ignore[arg-type]
    monkeypatch.setattr(resizing, "snapshot", lambda **_: seen)
    assert "5 workers with 1 CPU each can never start: the cluster has 4 CPU" in refused(driven, 5)
    Run(driven).resize(4)  # not now: it waits
    Run(driven).resize("3..6")
