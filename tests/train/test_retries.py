"""When workers are started again, by a clock of the test's."""

from __future__ import annotations

from shoal.train.retries import LONGEST_PAUSE_S, SHORT_LIFE_S, WINDOW_S, Retries


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def outcomes(limit: int, *lives_s: float) -> list[float | None]:
    """What each of some attempts is answered that lived so long."""
    clock = Clock()
    retries = Retries(limit, clock=clock)
    answers = []
    for life_s in lives_s:
        retries.started()
        clock.now += life_s
        answers.append(retries.failed())
    return answers


def test_a_death_is_answered_at_once_until_they_are_used_up() -> None:
    assert outcomes(2, 60.0, 60.0, 60.0) == [0.0, 0.0, None]
    assert outcomes(0, 60.0) == [None]


def test_failures_longer_ago_than_the_window_are_forgiven() -> None:
    assert outcomes(1, *[WINDOW_S] * 5) == [0.0] * 5
    assert outcomes(1, WINDOW_S, WINDOW_S - 1) == [0.0, None]


def test_who_fails_soon_after_each_start_waits_longer_each_time_and_not_for_ever() -> None:
    answers = outcomes(9, *[SHORT_LIFE_S / 2] * 9)
    assert answers == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_an_attempt_that_trained_ends_the_pauses() -> None:
    assert outcomes(9, 0.0, 0.0, 0.0, SHORT_LIFE_S, 0.0) == [0.0, 1.0, 2.0, 0.0, 0.0]


def test_all_failures_are_counted() -> None:
    clock = Clock()
    retries = Retries(1, clock=clock)
    for _ in range(3):
        clock.now += WINDOW_S
        retries.failed()
    assert retries.num_failures == 3


def test_there_are_more_until_they_are_used_up_and_again_when_they_are_forgiven() -> None:
    clock = Clock()
    retries = Retries(1, clock=clock)
    assert retries.has_more
    retries.failed()
    assert not retries.has_more
    clock.now += WINDOW_S
    assert retries.has_more
