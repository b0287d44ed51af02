"""How many workers a run should have while it trains: decided from what is wished and what is free."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.capacity import NodeFree, Snapshot, Steady, grant, next_size, restart_range, room
from shoal.capacity.elastic import LOOKS, MAX_LOOKS
from shoal.config import Range

RANGES = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda ends: Range(ends[0], sum(ends)))


@pytest.mark.parametrize(
    ("wish", "current", "free_room", "size"),
    [
        (Range(1, 4), 2, 0, 2),
        (Range(1, 4), 2, 1, 3),
        (Range(1, 4), 2, 9, 4),
        (Range(1, 4), 2, math.inf, 4),
        (Range(1, 1), 3, 9, 1),  # too many: at once, whatever is free
        (Range(2, 3), 4, 0, 3),
        (Range(3, 3), 1, 1, 1),  # two would not do either: it waits
        (Range(3, 3), 1, 2, 3),
        (Range(5, 9), 4, 0, 4),
    ],
)
def test_the_next_size(wish: Range, current: int, free_room: float, size: int) -> None:
    assert next_size(wish, current, free_room) == size


@given(RANGES, st.integers(1, 20), st.integers(0, 20))
def test_a_change_is_within_the_wish_and_within_the_room(wish: Range, current: int, free_room: int) -> None:
    size = next_size(wish, current, free_room)
    if size != current:
        assert size in wish
        assert size <= current + free_room
    assert size >= min(current, wish.max), "nobody is sent away unless the wish says so"
    assert next_size(wish, size, free_room + current - size) == size, "it settles"


def test_room_is_what_a_second_group_would_find() -> None:
    nodes = tuple(
        NodeFree(name=str(free), total={"CPU": 4, "GPU": 1}, free={"CPU": free, "GPU": 1}) for free in (1, 3)
    )
    assert room(Snapshot(nodes=nodes), {"CPU": 2}) == 1
    assert room(Snapshot(nodes=nodes), {"CPU": 1, "GPU": 1}) == 2
    assert room(Snapshot(nodes=nodes), {}) == math.inf


@given(RANGES, st.integers(1, 20), st.integers(1, 20), RANGES)
def test_whoever_gave_its_room_up_finds_it_again(
    wish: Range, before: int, free_room: int, changed: Range
) -> None:
    planned = next_size(wish, before, free_room)
    wanted = restart_range(changed, before=before, planned=planned)
    assert wanted.min <= before, "its own room is enough to go on"
    assert wanted.max <= max(planned, before)
    alone = Snapshot(nodes=(NodeFree(name="n", total={"CPU": before}, free={"CPU": before}),))
    assert grant(alone, wanted, {"CPU": 1}) >= 1


def test_what_was_planned_is_what_is_wanted() -> None:
    assert restart_range(Range(1, 4), before=1, planned=3) == Range(1, 3)
    assert restart_range(Range(3, 3), before=1, planned=3) == Range(1, 3)
    assert restart_range(Range(1, 1), before=3, planned=1) == Range(1, 1)
    assert restart_range(Range(2, 2), before=4, planned=2) == Range(2, 2)
    assert restart_range(Range(1, 2), before=1, planned=4) == Range(1, 2), "the wish changed on the way"


def looks_until_growth(steady: Steady, *, attempt: int = 1) -> int:
    for number in range(1, 2 * MAX_LOOKS):
        if steady.settle(attempt, 1, 2) == 2:
            return number
    raise AssertionError("it never grows")


def test_more_workers_only_when_several_looks_agree() -> None:
    assert looks_until_growth(Steady()) == LOOKS


def test_fewer_workers_at_once() -> None:
    assert Steady().settle(1, 3, 1) == 1


def test_a_look_that_disagrees_begins_anew() -> None:
    steady = Steady()
    for _ in range(LOOKS - 1):
        assert steady.settle(1, 1, 3) == 1
    assert steady.settle(1, 1, 2) == 1, "room for three was there for a moment"
    assert steady.settle(1, 1, 3) == 1
    for _ in range(LOOKS - 2):
        assert steady.settle(2, 1, 3) == 1, "another attempt"
    assert steady.settle(2, 1, 3) == 1
    assert steady.settle(2, 1, 3) == 3


def test_room_that_was_not_there_makes_the_next_growth_wait_longer() -> None:
    steady = Steady()
    steady.judge(got_it=False)
    assert looks_until_growth(steady) == 2 * LOOKS
    for _ in range(20):
        steady.judge(got_it=False)
    assert looks_until_growth(steady, attempt=2) == MAX_LOOKS
    steady.judge(got_it=True)
    assert looks_until_growth(steady, attempt=3) == LOOKS
