"""A run's journal as a timeline: scenarios with known answers, and what holds for any lines whatever."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.tracking import Doing, Timeline, timeline_of
from shoal.tracking.journal import KINDS, encode, parse

T0 = 1_795_000_000.0


def line(t: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"t": T0 + t, "kind": kind, "attempt": 1, **fields}


def start(t: float, step: int = 0, workers: int = 2, source: str = "fresh") -> dict[str, Any]:
    return line(t, "start", step=step, workers=workers, pids=[11, 12], source=source)


def steps(t: float, step: int) -> dict[str, Any]:
    return line(t, "metrics", step=step, values={})


def spans(timeline: Timeline) -> list[tuple[str, float, float]]:
    return [(s.doing.value, round(s.begin - T0, 3), round(s.end - T0, 3)) for s in timeline.spans]


def row(timeline: Timeline, kind: str) -> Any:
    (found,) = [moment for moment in timeline.moments if moment.kind == kind]
    return found


BEGUN = [line(0, "driver", workers="2", pid=7), line(3, "grant", workers=2, seconds=2.0), start(5)]


def test_an_undisturbed_run_is_waiting_starting_steps_and_an_end() -> None:
    timeline = timeline_of(
        [
            *BEGUN,
            line(6, "first_step", step=1),
            line(10, "eval", split="val", step=41, values={}, seconds=1.0),
            line(12, "checkpoint", step=41, path="c", size_bytes=2**20, seconds=1.5, pause_s=0.25),
            steps(16, 100),
            line(18, "eval", split="test", step=100, values={}, seconds=1.0),
            line(19, "end", step=100, state="finished", error=""),
        ]
    )
    assert spans(timeline) == [
        ("starting", 0, 1),
        ("waiting", 1, 3),
        ("starting", 3, 6),
        ("steps", 6, 9),
        ("evaluating", 9, 10),
        ("steps", 10, 10.25),
        ("saving", 10.25, 10.5),
        ("steps", 10.5, 16),
        ("ending", 16, 17),
        ("evaluating", 17, 18),
        ("ending", 18, 19),
    ]
    assert timeline.goodput == pytest.approx((3 + 0.25 + 5.5) / 19)
    assert (timeline.steps_lost, timeline.recoveries_s) == (0, ())
    assert timeline.counts == {"driver": 1, "start": 1, "checkpoint": 1, "end": 1}
    assert row(timeline, "start").seconds == pytest.approx(1.0)


def test_a_killed_worker_whose_steps_a_survivor_kept_costs_only_the_recovery() -> None:
    timeline = timeline_of(
        [
            *BEGUN,
            line(6, "first_step", step=1),
            steps(10, 81),
            line(11, "lost", ranks=[1], step=95, why="died"),
            line(11.2, "grant", workers=2, seconds=0.0),
            line(
                12, "checkpoint", step=101, path="c", size_bytes=1, seconds=0.0, values={}
            ),  # found by its successor
            start(12.1, step=101, source="checkpoint"),
            line(
                12.3, "eval", split="val", step=101, values={}, seconds=0.1
            ),  # which the death had prevented
            line(12.5, "first_step", step=102),
            steps(16.5, 182),
        ],
        until=T0 + 20,
    )
    assert spans(timeline)[3:] == [("steps", 6, 11), ("recovering", 11, 12.5), ("steps", 12.5, 20)]
    assert timeline.recoveries_s == pytest.approx((1.5,))
    assert timeline.steps_lost == 0
    assert row(timeline, "lost").detail == "rank 1 (pid 12)"
    assert timeline.goodput == pytest.approx(12.5 / 20)


def test_steps_that_are_computed_again_are_not_useful_over_several_attempts() -> None:
    timeline = timeline_of(
        [
            start(0),
            line(0, "first_step", step=0),
            steps(10, 100),
            line(10, "lost", ranks=[0], step=100),
            start(11, step=80),
            line(11, "first_step", step=80),
            steps(13, 100),
            line(13, "lost", ranks=[0], step=100),
            start(14, step=50),
            line(14, "first_step", step=50),
            steps(19, 100),
            line(19, "end", step=100, state="finished"),
        ]
    )
    assert spans(timeline) == [
        ("steps", 0, 5),  # up to the 50th
        ("repeated", 5, 10),
        ("recovering", 10, 11),
        ("repeated", 11, 13),
        ("recovering", 13, 14),
        ("steps", 14, 19),
    ]
    assert [moment.steps_lost for moment in timeline.moments if moment.kind == "start"] == [0, 20, 50]
    assert timeline.steps_lost == 70
    assert timeline.goodput == pytest.approx(10 / 19)


def test_what_survivors_committed_beyond_every_line_can_be_lost_later() -> None:
    timeline = timeline_of(
        [
            start(0),
            line(0, "first_step", step=0),
            steps(9, 90),
            line(10, "lost", ranks=[0], step=90),
            start(11, step=100),
            line(11, "first_step", step=100),
            line(12, "lost", ranks=[0, 1], step=110),
            start(13, step=95),  # the checkpoint of step 100 did not verify
            line(13, "first_step", step=95),
            steps(15, 115),
        ]
    )
    assert spans(timeline)[:3] == [("steps", 0, 9.5), ("repeated", 9.5, 10), ("recovering", 10, 11)]
    assert timeline.steps_lost == 15


def test_a_checkpoint_is_cut_out_of_no_evaluation_twice() -> None:
    timeline = timeline_of(
        [
            start(0),
            line(0, "first_step", step=0),
            line(6, "eval", split="val", step=40, values={}, seconds=3.0),
            line(9, "checkpoint", step=40, path="c", size_bytes=1, seconds=2.0, pause_s=2.0),
            steps(10, 60),
        ]
    )
    assert spans(timeline) == [("steps", 0, 3), ("evaluating", 3, 6), ("saving", 6, 7), ("steps", 7, 10)]


def test_a_hang_is_counted_from_when_the_worker_stood_still() -> None:
    stall = line(20, "stall", ranks=[1], step=50, seconds=6.0, why="did not answer", replaced=True)
    timeline = timeline_of(
        [
            start(0),
            line(1, "first_step", step=1),
            steps(13, 49),
            stall,
            line(20.1, "lost", ranks=[1], step=50),
            start(21, step=50),
            line(22, "first_step", step=51),
        ]
    )
    assert spans(timeline) == [
        ("starting", 0, 1),
        ("steps", 1, 14),
        ("hanging", 14, 20),
        ("steps", 20, 20.1),
        ("recovering", 20.1, 22),
    ]
    assert timeline.recoveries_s == pytest.approx((8.0,))  # from SIGSTOP, say, to the next step


def test_a_resize_is_a_pause_between_two_steps() -> None:
    timeline = timeline_of(
        [
            start(0),
            line(0, "first_step", step=1),
            steps(4, 40),
            line(4.5, "resize", step=40, **{"from": 2, "to": 3}),
            line(5, "grant", workers=3, seconds=0.25),
            start(6, step=40, workers=3),
            line(7, "first_step", step=41),
            steps(8, 50),
            line(8, "end", step=50, state="stopped"),
        ]
    )
    assert spans(timeline) == [
        ("steps", 0, 4),
        ("resizing", 4, 4.75),
        ("waiting", 4.75, 5),
        ("resizing", 5, 7),
        ("steps", 7, 8),
    ]
    moment = row(timeline, "resize")
    assert (moment.seconds, moment.workers, moment.detail) == (pytest.approx(3.0), 3, "from 2 to 3 workers")
    assert timeline.recoveries_s == ()


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_the_time_between_two_drivers_is_no_wall_time(how: str) -> None:
    first = [start(0), line(0, "first_step", step=0), steps(10, 100)]
    if how == "stopped":
        first.append(line(10, "end", step=100, state="stopped"))
    second = [
        line(1000, "driver", workers="2", pid=8),
        start(1002, step=100, source="checkpoint"),
        line(1002, "first_step", step=101),
        steps(1010, 200),
    ]
    timeline = timeline_of([*first, *second])
    assert timeline.seconds[Doing.AWAY] == pytest.approx(990)
    assert timeline.wall_s == pytest.approx(20)
    assert timeline.goodput == pytest.approx(18 / 20)
    assert timeline.recoveries_s == ()  # somebody asked: it did not go on by itself
    assert ("vanished" in timeline.counts) == (how == "killed" or timeline.moments[-1].kind == "vanished")


def test_a_death_that_no_line_tells_was_at_the_last_sign_of_life() -> None:
    """As under torchrun, and in journals of an earlier version, which name no first steps either."""
    found = line(8.9, "checkpoint", step=40, path="c", size_bytes=1, seconds=0.0)  # by the next attempt
    timeline = timeline_of([start(0), steps(4, 40), found, start(9, step=40), steps(13, 80)])
    assert spans(timeline) == [("steps", 0, 4), ("recovering", 4, 9), ("steps", 9, 13)]
    assert timeline.recoveries_s == (5.0,)
    assert (row(timeline, "checkpoint").seconds, "found by" in row(timeline, "checkpoint").detail) == (
        None,
        True,
    )
    kinds = [moment.kind for moment in timeline.moments if moment.kind != "checkpoint"]
    assert kinds == ["start", "vanished", "recovery", "start", "vanished"]


def test_steps_that_an_attempt_goes_back_over_by_itself_are_repeated() -> None:
    timeline = timeline_of(
        [start(0), line(0, "first_step", step=0), steps(10, 100), steps(12, 60), steps(16, 100)]
    )
    assert spans(timeline) == [("steps", 0, 6), ("repeated", 6, 12), ("steps", 12, 16)]
    assert timeline.steps_lost == 40


@pytest.mark.parametrize("kind", ["bad_step", "out_of_memory"])
def test_beginning_anew_is_a_recovery_and_its_steps_are_repeated(kind: str) -> None:
    bad = line(10, kind, step=100, message="step 100: it goes back")
    if kind == "bad_step":
        bad["action"] = "rollback"
    again = [start(11, step=50), line(12, "first_step", step=51), steps(16, 100)]
    timeline = timeline_of([start(0), line(0, "first_step", step=0), steps(10, 100), bad, *again])
    assert spans(timeline) == [
        ("steps", 0, 5),
        ("repeated", 5, 10),
        ("recovering", 10, 12),
        ("steps", 12, 16),
    ]
    assert (timeline.recoveries_s, timeline.steps_lost) == ((2.0,), 50)
    assert timeline.counts.get("vanished") == 1  # the last attempt, which is not over


def test_a_clock_that_was_set_back_costs_the_unknown_moment_and_no_more() -> None:
    timeline = timeline_of(
        [start(0), line(0, "first_step", step=0), steps(10, 100), steps(-3600, 100), steps(-3590, 200)]
    )
    assert spans(timeline) == [("steps", 0, 20)]
    skewed = [start(0), line(0, "first_step", step=0), steps(10, 100), steps(9, 100), steps(12, 120)]
    assert spans(timeline_of(skewed)) == [("steps", 0, 12)]


def test_lines_of_another_version_are_shown_and_change_nothing_else() -> None:
    known = [*BEGUN, line(6, "first_step", step=1), steps(10, 81)]
    unknown = [
        line(7, "bad_step", step=20, message="the loss is NaN\nand more"),
        {"kind": "of tomorrow", "t": "noon"},
        line(8, "of tomorrow", ids=[1, 2]),
    ]
    timeline = timeline_of([*known[:4], *unknown, *known[4:]])
    assert timeline.spans == timeline_of(known).spans
    assert row(timeline, "bad_step").detail == "the loss is NaN"
    assert row(timeline, "of tomorrow").detail == "ids=[1, 2]"


def test_a_run_that_never_started_has_waited_in_vain() -> None:
    events = [line(0, "driver", workers="9", pid=7), line(60, "end", step=0, state="failed", error="no room")]
    timeline = timeline_of(events)
    assert (timeline.goodput, timeline.wall_s) == (0.0, 60.0)
    assert timeline_of([]).goodput is None
    assert timeline_of([], until=T0).spans == ()


# -- whatever the lines are ---------------------------------------------------------------------------

_NUMBERS = st.one_of(st.none(), st.integers(-5, 300), st.floats(-10, 300), st.text(max_size=2))
_LINES = st.fixed_dictionaries(
    {"kind": st.sampled_from([*sorted(KINDS), "of tomorrow"]), "gap": st.floats(-200, 200)},
    optional={
        "step": st.one_of(st.integers(0, 60), _NUMBERS),
        "seconds": _NUMBERS,
        "pause_s": _NUMBERS,
        "size_bytes": _NUMBERS,
        "workers": st.one_of(st.integers(1, 4), st.just("1..4")),
        "ranks": st.one_of(st.lists(st.integers(-1, 3), max_size=3), _NUMBERS),
        "pids": st.one_of(st.lists(st.integers(1, 9), max_size=3), _NUMBERS),
        "replaced": st.booleans(),
        "state": st.sampled_from(["finished", "stopped", "failed"]),
        "error": st.one_of(st.none(), st.text(max_size=5)),
    },
)


def dated(drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    t, events = T0, []
    for one in drawn:
        t += one["gap"]
        events.append({"t": t, **{name: value for name, value in one.items() if name != "gap"}})
    return events


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(_LINES, max_size=25), st.booleans())
def test_spans_follow_each_other_and_add_up(drawn: list[dict[str, Any]], is_active: bool) -> None:
    events = dated(drawn)
    timeline = timeline_of(events, until=T0 + 1e5 if is_active else None)
    assert all(span.end > span.begin for span in timeline.spans)
    assert all(one.end == other.begin for one, other in pairwise(timeline.spans))
    assert sum(timeline.seconds.values()) == pytest.approx(
        (timeline.end or 0) - (timeline.begin or 0), abs=1e-3
    )
    assert timeline.wall_s + timeline.seconds[Doing.AWAY] == pytest.approx(
        sum(timeline.seconds.values()), abs=1e-3
    )
    assert timeline.goodput is None or 0 <= timeline.goodput <= 1
    assert timeline.steps_lost >= 0
    assert all(seconds >= 0 for seconds in timeline.recoveries_s)
    shown = [event for event in events if event["kind"] not in ("grant", "first_step", "metrics", "eval")]
    derived = [moment for moment in timeline.moments if moment.kind in ("recovery", "vanished")]
    assert len(timeline.moments) == len(shown) + len(derived)
    assert not math.isnan(sum(span.seconds for span in timeline.spans))
    json.dumps(timeline.as_dict(), allow_nan=False)


def test_a_journal_torn_at_any_byte_is_one_with_fewer_lines() -> None:
    fields: list[tuple[str, dict[str, Any]]] = [
        ("driver", {"workers": "2", "host": "here", "pid": 7}),
        ("grant", {"workers": 2, "seconds": 0.5}),
        ("start", {"workers": 2, "pids": [1, 2], "step": 0, "target_steps": 9, "source": "fresh"}),
        ("first_step", {"step": 1}),
        ("metrics", {"step": 5, "values": {"loss": math.nan}}),
        ("lost", {"ranks": [1], "step": 5, "why": "died"}),
        ("start", {"workers": 2, "pids": [1, 3], "step": 5, "target_steps": 9, "source": "checkpoint"}),
        ("first_step", {"step": 6}),
        ("end", {"step": 9, "state": "finished", "error": ""}),
    ]
    text = "".join(
        encode(kind, t=T0 + number, attempt=1, fields=each) + "\n"
        for number, (kind, each) in enumerate(fields)
    ).encode()
    for cut in range(len(text) + 1):
        *lines, tail = text[:cut].split(b"\n")
        events = [event for each in lines if (event := parse(each)) is not None]
        assert len(events) == len(lines)
        assert parse(tail) is None or text[cut : cut + 1] == b"\n"
        timeline = timeline_of(events)
        assert sum(timeline.seconds.values()) == pytest.approx(max(0, len(events) - 1))
