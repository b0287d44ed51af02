"""Which worker of a group hangs: played on a clock of the test's, a look each 0.4 s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from shoal.train.pulse import Phase, Pulse
from shoal.train.watchdog import Stall, Watchdog, Why

LOOK_S = 0.4


def pulse(
    phase: Phase = "step",
    *,
    age_s: float = 0.0,
    waits: bool = False,
    step_s: float | None = 0.002,
    steps: int = 40,
) -> Pulse:
    return Pulse(phase, steps, age_s, waits, step_s if phase != "set up" else None, 0)


class Play:
    """A group whose members' pulses age, or of which nothing is heard (None)."""

    def __init__(self) -> None:
        self.dog = Watchdog()
        self.now = 1000.0

    def restart(self) -> None:
        self.dog.begin_group()

    def run(self, group: Mapping[int, Pulse | None], *, for_s: float, gap_s: float = LOOK_S) -> Stall | None:
        """Let ``for_s`` pass, or what it takes to the first verdict."""
        began = self.now
        while self.now - began < for_s:
            self.now += gap_s
            passed = self.now - began
            self.dog.look(
                {
                    rank: replace(each, age_s=each.age_s + passed) if each is not None else None
                    for rank, each in group.items()
                },
                self.now,
            )
            if stall := self.dog.judge():
                return stall
        return None


@pytest.fixture
def play() -> Play:
    play = Play()
    assert play.run({0: pulse(), 1: pulse()}, for_s=2) is None
    return play


def about(stall: Stall | None, why: Why, *ranks: int, seconds: float) -> bool:
    assert stall is not None
    return (stall.why, stall.ranks) == (why, ranks) and seconds <= stall.seconds <= seconds + 1


def test_a_stopped_rank_is_named_after_five_seconds(play: Play) -> None:
    stall = play.run({0: replace(pulse(waits=True), steps=41), 1: None}, for_s=60)
    assert about(stall, Why.SILENT, 1, seconds=5)
    assert stall is not None
    assert (stall.steps, stall.pulses[1].steps) == (41, 40)


def test_a_rank_that_stopped_while_it_waited_is_named_and_not_its_peer(play: Play) -> None:
    play.run({0: pulse(waits=True), 1: pulse(waits=True)}, for_s=0.4)
    assert about(play.run({0: pulse(waits=True), 1: None}, for_s=60), Why.SILENT, 1, seconds=5)


def test_a_rank_for_which_its_peers_wait_is_named_after_five_seconds(play: Play) -> None:
    group = {0: pulse(waits=True), 1: pulse(), 2: pulse(waits=True)}
    assert about(play.run(group, for_s=60), Why.STILL, 1, seconds=5)


def test_slow_steps_are_given_ten_of_them(play: Play) -> None:
    group = {0: pulse(waits=True, step_s=3.0), 1: pulse(step_s=3.0)}
    assert about(play.run(group, for_s=60), Why.STILL, 1, seconds=30)
    play.restart()
    assert play.run({0: pulse(step_s=3.0), 1: pulse(step_s=3.0)}, for_s=2) is None
    assert about(play.run({0: pulse(waits=True), 1: None}, for_s=60), Why.SILENT, 1, seconds=30)


def test_where_nobody_waits_only_time_speaks(play: Play) -> None:
    assert about(play.run({0: pulse(age_s=1), 1: pulse()}, for_s=60), Why.STILL, 0, seconds=20)


def test_a_run_of_one_is_watched_too(play: Play) -> None:
    play.restart()
    assert about(play.run({0: pulse()}, for_s=60), Why.STILL, 0, seconds=20)


def test_all_that_wait_for_each_other_are_named(play: Play) -> None:
    group = {0: pulse(waits=True), 1: pulse(waits=True), 2: pulse("done")}
    stall = play.run(group, for_s=60)
    assert about(stall, Why.APART, 0, 1, seconds=20)
    assert stall is not None
    assert stall.victim == 1


def test_those_that_wait_for_each_other_are_given_the_longest_of_their_limits(play: Play) -> None:
    group = {0: pulse(waits=True), 1: pulse("save", waits=True)}
    assert about(play.run(group, for_s=1000), Why.APART, 0, 1, seconds=600)


@pytest.mark.parametrize(("phase", "limit_s"), [("evaluate", 120.0), ("save", 600.0)])
def test_a_pause_of_the_engines_has_a_limit_of_its_own(play: Play, phase: Phase, limit_s: float) -> None:
    group = {0: pulse(waits=True), 1: pulse(phase)}
    assert about(play.run(group, for_s=1000), Why.STILL, 1, seconds=limit_s)


def test_set_up_may_take_its_time(play: Play) -> None:
    play.restart()
    assert play.run({0: pulse("set up", waits=True), 1: pulse("set up")}, for_s=3600) is None
    assert play.run({0: pulse("set up", waits=True), 1: pulse("set up", waits=True)}, for_s=3600) is None
    assert play.run({0: pulse("step", waits=True), 1: pulse("set up")}, for_s=3600) is None


def test_set_up_may_hold_the_interpreters_lock_for_a_minute(play: Play) -> None:
    play.restart()
    for seconds in (60, 60, 240):
        assert about(play.run({0: pulse("set up"), 1: None}, for_s=600), Why.SILENT, 1, seconds=seconds)
        play.restart()


def test_set_up_is_over_for_one_that_was_last_heard_in_it_when_it_is_over_for_a_peer(play: Play) -> None:
    play.restart()
    play.run({0: pulse("set up"), 1: pulse("set up")}, for_s=0.4)
    stall = play.run({0: pulse(waits=True, step_s=1.0), 1: None}, for_s=60)
    assert about(stall, Why.SILENT, 1, seconds=10)
    assert stall is not None
    assert stall.phase == "step"


def test_peers_that_wait_for_a_replacement_do_not_hurry_its_set_up(play: Play) -> None:
    play.dog.begin_group([1])
    assert play.run({0: pulse("done"), 1: None}, for_s=50) is None


def test_of_two_that_stopped_the_second_is_found_right_after_the_first_was_replaced(play: Play) -> None:
    assert play.run({rank: pulse() for rank in range(3)}, for_s=2) is None
    silent = {0: pulse(waits=True), 1: None, 2: None}
    assert about(play.run(silent, for_s=60), Why.SILENT, 1, seconds=5)
    assert about(play.run(silent, for_s=60), Why.SILENT, 2, seconds=5)
    play.dog.begin_group([1])
    assert play.run({0: pulse("done"), 1: pulse("set up"), 2: None}, for_s=60) is None, "it was told already"
    play.dog.begin_group([2])
    again = {0: pulse(waits=True), 1: None, 2: pulse(waits=True)}
    assert play.run({rank: pulse(steps=60) for rank in range(3)}, for_s=2) is None
    assert about(play.run(again, for_s=60), Why.SILENT, 1, seconds=5), "the limit has not grown"


def test_nothing_is_expected_of_those_that_are_done(play: Play) -> None:
    assert play.run({0: pulse("done"), 1: pulse("done")}, for_s=3600) is None


def test_one_that_answers_again_was_not_silent(play: Play) -> None:
    for _ in range(50):
        assert play.run({0: pulse(), 1: None}, for_s=4) is None
        assert play.run({0: pulse(), 1: pulse()}, for_s=0.4) is None


def test_one_that_died_is_no_longer_judged(play: Play) -> None:
    assert play.run({0: pulse(waits=True), 1: None}, for_s=4) is None
    assert play.run({0: pulse()}, for_s=3) is None
    assert play.run({0: pulse(), 1: None}, for_s=4) is None


def test_a_controller_that_was_stopped_itself_has_not_seen_silence(play: Play) -> None:
    assert play.run({0: pulse(waits=True), 1: None}, for_s=3600, gap_s=3600) is None


def test_what_hangs_and_goes_on_after_a_restart_is_noticed_as_soon_the_next_time(play: Play) -> None:
    for steps in (40, 41, 50):
        stuck = {0: pulse(steps=steps), 1: pulse(steps=steps, waits=True)}
        assert about(play.run(stuck, for_s=60), Why.STILL, 0, seconds=5)
        play.restart()


def test_a_stall_where_the_last_one_was_makes_the_limit_of_its_kind_grow_for_ever(play: Play) -> None:
    paused = {0: pulse(), 1: pulse(waits=True)}
    for limit_s in (5, 5, 20, 80):
        assert about(play.run(paused, for_s=1000), Why.STILL, 0, seconds=limit_s)
        play.restart()
        assert play.run({0: pulse(), 1: pulse()}, for_s=2) is None
    assert play.run(paused, for_s=300) is None  # a pause of five minutes: four restarts, and no more
    assert about(play.run({0: pulse(), 1: None}, for_s=60), Why.SILENT, 1, seconds=5)  # a kind of its own


@pytest.mark.parametrize(
    ("survivor", "is_hopeless"),
    [
        (pulse(age_s=6, waits=True), True),
        (pulse(age_s=4, waits=True), False),
        (pulse(age_s=6, waits=True, step_s=1.0), False),
        (pulse("evaluate", age_s=6), True),
        (pulse("save", age_s=500), False),
        (pulse("set up", age_s=500), False),
    ],
)
def test_a_survivor_that_does_not_get_out_is_hopeless_unless_it_saves(
    survivor: Pulse, is_hopeless: bool
) -> None:
    dog = Watchdog()
    assert not dog.is_hopeless(0)
    dog.look({0: survivor}, 0.0)
    assert dog.is_hopeless(0) == is_hopeless


def test_a_survivor_that_stopped_is_hopeless(play: Play) -> None:
    play.run({0: pulse()}, for_s=0.4)
    play.run({0: None}, for_s=3)
    assert not play.dog.is_hopeless(0)
    play.run({0: None}, for_s=4)
    assert play.dog.is_hopeless(0)
