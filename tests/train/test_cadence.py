"""What is due between steps, by a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shoal.train.cadence import MAX_METRIC_GAP_S, NUM_METRIC_LINES, STOP_POLL_S, Cadence


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def cadence_of(clock: Clock, *, target_steps: int = 10, checkpoint_every_s: float = 30.0) -> Cadence:
    return Cadence(target_steps=target_steps, checkpoint_every_s=checkpoint_every_s, clock=clock)


def test_a_checkpoint_is_due_a_whole_interval_after_the_last(clock: Clock) -> None:
    cadence = cadence_of(clock)
    clock.now += 29.5
    assert not cadence.is_checkpoint_due()
    clock.now += 0.5
    assert cadence.is_checkpoint_due()
    assert cadence.is_checkpoint_due(), "asking changes nothing"
    clock.now += 7  # it took that long to be handed over
    cadence.checkpoint_taken()
    clock.now += 29.5
    assert not cadence.is_checkpoint_due()
    clock.now += 0.5
    assert cadence.is_checkpoint_due()


def test_auto_takes_a_hundred_times_what_one_cost(clock: Clock) -> None:
    cadence = Cadence(target_steps=10, checkpoint_every_s=None, clock=clock)

    def step(seconds: float, *, is_writing: bool = False) -> None:
        cadence.step_begins(is_writing=is_writing)
        clock.now += seconds
        cadence.step_ended()

    step(0.1)
    clock.now += 29.5
    assert not cadence.is_checkpoint_due(), "30 s before anything was measured"
    clock.now += 0.5
    assert cadence.is_checkpoint_due()
    cadence.checkpoint_begins()
    clock.now += 0.2
    cadence.checkpoint_taken()
    clock.now += 9.0  # an evaluation costs the checkpoint nothing
    step(0.15, is_writing=True)
    step(0.1)
    clock.now += 25.0 - 9.3
    assert not cadence.is_checkpoint_due(), "0.25 s every 25"
    clock.now += 0.1
    assert cadence.is_checkpoint_due()


def test_no_interval_is_a_checkpoint_at_every_step(clock: Clock) -> None:
    assert cadence_of(clock, checkpoint_every_s=0.0).is_checkpoint_due()


def test_the_stop_mark_is_looked_at_now_and_then(clock: Clock) -> None:
    cadence = cadence_of(clock)
    assert not cadence.is_look_due()
    clock.now += STOP_POLL_S
    assert cadence.is_look_due()
    cadence.looked()
    assert not cadence.is_look_due()


@pytest.mark.parametrize("target_steps", [1, 10, NUM_METRIC_LINES, 10 * NUM_METRIC_LINES + 7])
def test_a_run_writes_about_so_many_lines(clock: Clock, target_steps: int) -> None:
    cadence = cadence_of(clock, target_steps=target_steps)
    due = sum(cadence.is_line_due(step) for step in range(1, target_steps + 1))
    assert due == min(target_steps, NUM_METRIC_LINES)


def test_a_slow_run_is_not_silent(clock: Clock) -> None:
    cadence = cadence_of(clock, target_steps=100 * NUM_METRIC_LINES)
    assert not cadence.is_line_due(1)
    clock.now += MAX_METRIC_GAP_S + 0.5
    assert cadence.is_line_due(2)
    cadence.line_written()
    assert not cadence.is_line_due(3)
