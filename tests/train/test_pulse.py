"""What a worker says about itself, on a clock of the test's."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from shoal.train.group import Group
from shoal.train.pulse import NUM_DURATIONS, Heart, Pulse


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heart(clock: Clock) -> Heart:
    return Heart(clock)


def steps(heart: Heart, clock: Clock, *durations: float) -> None:
    for duration in durations:
        clock.now += duration
        heart.step(heart.read().steps + 1)


def test_it_is_set_up_until_a_steps_duration_is_known(heart: Heart, clock: Clock) -> None:
    steps(heart, clock, 90.0)  # compiled
    assert heart.read() == Pulse("set up", 1, 0.0, False, None, 0)
    steps(heart, clock, 0.25)
    assert heart.read() == Pulse("step", 2, 0.0, False, 0.25, 0)
    clock.now += 3
    assert heart.read().age_s == 3.0


def test_who_waits_for_something_to_tell_waits_only_while_steps_follow_each_other(
    heart: Heart, clock: Clock
) -> None:
    def is_told_at_once() -> bool:
        return heart.wait_while_uneventful(0.0)

    told = threading.Thread(target=heart.wait_while_uneventful, args=(60.0,))

    def attempt() -> None:
        with heart.attempt():
            assert is_told_at_once()
            steps(heart, clock, 1.0, 1.0)
            assert not is_told_at_once()
            with heart.during("save"):
                assert is_told_at_once()
            assert not is_told_at_once()
            told.start()
            raise RuntimeError("a peer was lost")

    assert is_told_at_once()  # nothing of ours runs, or it is being set up
    with pytest.raises(RuntimeError, match="a peer was lost"):
        attempt()
    told.join(10)
    assert not told.is_alive()
    assert is_told_at_once()


def test_the_median_is_that_of_the_last_steps(heart: Heart, clock: Clock) -> None:
    steps(heart, clock, 1.0, *[9.0] * NUM_DURATIONS)
    assert heart.read().step_s == 9.0
    steps(heart, clock, *[2.0] * (NUM_DURATIONS // 2 + 1))
    assert heart.read().step_s == 2.0


def test_what_happens_between_steps_is_no_step_and_has_a_name(heart: Heart, clock: Clock) -> None:
    steps(heart, clock, 1.0, 1.0)
    with heart.during("evaluate"):
        clock.now += 50
        assert (heart.read().phase, heart.read().age_s) == ("evaluate", 50.0)
        heart.beat()
        assert heart.read().age_s == 0.0
        with heart.during("save"):
            clock.now += 50
            assert heart.read().phase == "save"
        assert heart.read() == replace(heart.read(), phase="evaluate", age_s=0.0)
    steps(heart, clock, 1.0)
    assert heart.read() == Pulse("step", 3, 0.0, False, 1.0, 0)


def test_set_up_stays_set_up_whatever_is_done_in_it(heart: Heart) -> None:
    with heart.during("evaluate"):
        assert heart.read().phase == "set up"


def test_an_attempt_begins_anew_and_ends_as_done(heart: Heart, clock: Clock) -> None:
    steps(heart, clock, 1.0, 1.0)
    with heart.attempt():
        assert heart.read() == Pulse("set up", 0, 0.0, False, None, threading.get_ident())
        steps(heart, clock, 1.0, 1.0)
        assert heart.read().phase == "step"
    assert heart.read().phase == "done"


def test_a_collective_is_waited_in_until_it_ends_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    from shoal.errors import PeerLost
    from shoal.train.pulse import heart

    seen = []

    def fail(*_: object, **__: object) -> None:
        seen.append(heart.read().is_waiting)
        raise RuntimeError("connection closed by peer")

    for name in ("all_reduce", "broadcast", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, fail)
    two = Group(1, 2, torch.device("cpu"))
    one = torch.zeros(1)
    for call in (
        lambda: two.sum(one),
        lambda: two.broadcast(one),
        lambda: two.gather(1),
        lambda: two.share(1),
        lambda: two.finish(type("Work", (), {"wait": fail})()),  # type: ignore[arg-type]
    ):
        with pytest.raises(PeerLost):
            call()
        assert not heart.read().is_waiting
    assert seen == [True] * 5
    with pytest.raises(PeerLost):
        two.start_sum(one)  # only begun
    assert seen[5:] == [False]
