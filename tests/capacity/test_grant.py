"""`grant`: a pure function, held to its promises by generated clusters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.capacity import Holding, NodeFree, Snapshot, ceiling, grant
from shoal.capacity.policy import describe
from shoal.config import Range
from shoal.errors import RequestError

AMOUNTS = st.integers(0, 80).map(lambda tenths: tenths / 10)
NAMES = ("CPU", "GPU")


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    nodes = []
    for number in range(draw(st.integers(1, 4))):
        total = {name: draw(AMOUNTS) for name in NAMES}
        free = {
            name: round(amount * draw(st.sampled_from([0.0, 0.5, 1.0])), 1) for name, amount in total.items()
        }
        nodes.append(NodeFree(name=f"n{number}", total=total, free=free))
    return Snapshot(nodes=tuple(nodes))


WANTS = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(lambda ends: Range(min(ends), max(max(ends), 1)))
NEEDS = st.fixed_dictionaries({"CPU": AMOUNTS, "GPU": AMOUNTS}).filter(lambda need: any(need.values()))


def packed(free: list[dict[str, float]], per_worker: dict[str, float], most: int) -> int:
    """By another route than the code: put workers onto nodes one at a time until none fits."""
    started = 0
    while started < most:
        for node in free:
            if all(node[name] + 1e-6 >= need for name, need in per_worker.items()):
                for name, need in per_worker.items():
                    node[name] -= need
                started += 1
                break
        else:
            break
    return started


@given(snapshots(), WANTS, NEEDS)
def test_a_grant_is_the_most_that_really_fits(
    snapshot: Snapshot, want: Range, per_worker: dict[str, float]
) -> None:
    fits_now = packed([dict(node.free) for node in snapshot.nodes], per_worker, want.max)
    fits_ever = packed([dict(node.total) for node in snapshot.nodes], per_worker, want.max)
    least = max(want.min, 1)
    if fits_ever < least:
        with pytest.raises(RequestError):
            grant(snapshot, want, per_worker)
    else:
        assert grant(snapshot, want, per_worker) == (fits_now if fits_now >= least else 0)


@given(snapshots(), WANTS, NEEDS)
def test_what_is_impossible_does_not_depend_on_who_holds_what(
    snapshot: Snapshot, want: Range, per_worker: dict[str, float]
) -> None:
    empty = Snapshot(nodes=tuple(NodeFree(name=n.name, total=n.total, free=n.total) for n in snapshot.nodes))
    outcomes = set()
    for seen in (snapshot, empty):
        try:
            grant(seen, want, per_worker)
            outcomes.add("possible")
        except RequestError:
            outcomes.add("impossible")
    assert len(outcomes) == 1


def one_node(*, total: float, free: float, held: tuple[Holding, ...] = ()) -> Snapshot:
    node = NodeFree(name="here", total={"CPU": total}, free={"CPU": free})
    return Snapshot(nodes=(node,), held=held)


def test_a_run_beside_a_serve_app_gets_what_is_left() -> None:
    assert grant(one_node(total=4, free=2), Range(1, 4), {"CPU": 1}) == 2


def test_less_than_the_minimum_is_not_granted_in_part() -> None:
    assert grant(one_node(total=4, free=2), Range(3, 4), {"CPU": 1}) == 0


def test_free_halves_on_two_nodes_are_not_one_worker() -> None:
    node = NodeFree(name="n", total={"CPU": 2}, free={"CPU": 1})
    assert grant(Snapshot(nodes=(node, node)), Range(1, 1), {"CPU": 2}) == 0


def test_sums_of_decimal_fractions_count_as_ray_counts_them() -> None:
    assert grant(one_node(total=1, free=1 - 0.9), Range(1, 3), {"CPU": 0.1}) == 1


def test_a_worker_that_needs_nothing_always_fits() -> None:
    assert ceiling(one_node(total=1, free=0), {"CPU": 0}) == math.inf
    assert grant(one_node(total=1, free=0), Range(1, 7), {"CPU": 0}) == 7


def test_the_impossible_names_numbers_and_who_holds_what() -> None:
    seen = one_node(total=4, free=1, held=(Holding(name="Replica", resources={"CPU": 1.5}, count=2),))
    with pytest.raises(RequestError) as caught:
        grant(seen, Range(9, 9), {"CPU": 1})
    message = str(caught.value)
    for part in ("9 workers", "1 CPU each", "4 CPU on 1 node", "1 of 4 CPU", "2 x Replica (1.5 CPU each)"):
        assert part in message


def test_nobody_holds_what_is_free_and_nothing_is_said_of_holders_that_are_not_known() -> None:
    assert describe(one_node(total=4, free=4), {"CPU": 1}) == "free: 4 of 4 CPU; held by: nobody"
    assert describe(one_node(total=4, free=3), {"CPU": 1}) == "free: 3 of 4 CPU"
