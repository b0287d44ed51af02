"""Waiting for room: told by a fake cluster and a fake clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shoal.capacity import Holding, NodeFree, Snapshot, wait_for_grant
from shoal.config import Range
from shoal.errors import DeadlineExceeded, RequestError


class Cluster:
    """A 4-CPU node whose free CPUs follow a script; the last entry stays."""

    def __init__(self, *free: float) -> None:
        self.free = list(free)
        self.num_looks = 0

    def look(self, *, with_holders: bool = False) -> Snapshot:
        now = self.free[min(self.num_looks, len(self.free) - 1)]
        self.num_looks += 1
        held = (Holding(name="Hog", resources={"CPU": 4 - now}),) if with_holders else ()
        return Snapshot(nodes=(NodeFree(name="n", total={"CPU": 4}, free={"CPU": now}),), held=held)


class Stop(threading.Event):
    """Waits without waiting."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


@pytest.fixture
def seconds() -> Iterator[float]:
    return iter(range(1000))  # type: ignore[return-value]


def wait(
    cluster: Cluster, want: Range, seconds: Iterator[float], stop: Stop | None = None, hold_out_s: float = 0.0
) -> int:
    return wait_for_grant(
        lambda: want,
        {"CPU": 1},
        wait_s=5,
        hold_out_s=hold_out_s,
        stop=stop or Stop(),
        look=cluster.look,
        clock=lambda: next(seconds),
    )


def test_whoever_holds_out_takes_less_only_when_the_rest_did_not_come(seconds: Iterator[float]) -> None:
    cluster = Cluster(1, 1, 3)
    assert wait(cluster, Range(1, 3), seconds, hold_out_s=4) == 3
    assert cluster.num_looks == 3, "there is nothing more to hold out for"
    assert wait(Cluster(1, 2), Range(1, 3), seconds, hold_out_s=3) == 2
    assert wait(Cluster(1, 3), Range(1, 3), seconds) == 1


def test_what_is_wanted_may_change_while_it_waits(seconds: Iterator[float]) -> None:
    wishes = iter([Range(3, 3), Range(1, 2)])
    found = wait_for_grant(
        lambda: next(wishes),
        {"CPU": 1},
        wait_s=5,
        stop=Stop(),
        look=Cluster(2).look,
        clock=lambda: next(seconds),
    )
    assert found == 2


def test_room_that_comes_while_waiting_is_taken(seconds: Iterator[float]) -> None:
    assert wait(Cluster(0, 1, 3), Range(2, 4), seconds) == 3


def test_no_room_in_time_says_who_holds_it(seconds: Iterator[float]) -> None:
    with pytest.raises(DeadlineExceeded, match=r"within 5 s; free: 1 of 4 CPU; held by: Hog \(3 CPU\)"):
        wait(Cluster(1), Range(2, 4), seconds)


def test_the_impossible_is_refused_at_once_and_says_who_holds_what(seconds: Iterator[float]) -> None:
    cluster = Cluster(1)
    with pytest.raises(RequestError, match=r"5 workers .* 4 CPU on 1 node.*Hog \(3 CPU\)"):
        wait(cluster, Range(5, 5), seconds)
    assert cluster.num_looks == 2


def test_stopping_ends_the_wait_without_a_grant(seconds: Iterator[float]) -> None:
    stop = Stop()
    stop.set()
    assert wait(Cluster(4), Range(1, 1), seconds, stop) == 0
