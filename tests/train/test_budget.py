"""How often to checkpoint, from measured seconds; no clock, no run."""

from __future__ import annotations

import pytest

from shoal.train.budget import FIRST_S, MAX_S, MIN_S, Budget


def cost(budget: Budget, *, pause_s: float, beside_s: list[float], usual_s: float = 0.1) -> None:
    """A checkpoint, with steps before it, beside it and after it."""
    for _ in range(5):
        budget.stepped(usual_s, is_writing=False)
    budget.paused(pause_s)
    for seconds in beside_s:
        budget.stepped(seconds, is_writing=True)
    budget.stepped(usual_s, is_writing=False)


def test_before_anything_was_measured_it_is_the_usual_interval() -> None:
    budget = Budget()
    assert budget.interval_s == FIRST_S
    budget.stepped(0.1, is_writing=False)
    budget.paused(0.2)
    budget.stepped(0.1, is_writing=True)
    assert budget.interval_s == FIRST_S, "the first one is not over"


@pytest.mark.parametrize(
    ("pause_s", "beside_s", "expected_s"),
    [
        (0.2, [0.1, 0.1], 20.0),
        (0.2, [0.15, 0.15], 30.0),  # the steps beside it cost as much as if training had stood still
        (0.2, [0.01], 20.0),  # a fast step pays nothing back
        (0.001, [0.1], MIN_S),
        (60.0, [0.1], MAX_S),
        (0.2, [], 20.0),
    ],
)
def test_a_hundred_times_what_one_costs_within_bounds(
    pause_s: float, beside_s: list[float], expected_s: float
) -> None:
    budget = Budget()
    cost(budget, pause_s=pause_s, beside_s=beside_s)
    assert budget.interval_s == pytest.approx(expected_s)


def test_one_that_was_held_up_is_outvoted() -> None:
    budget = Budget()
    for pause_s in (0.2, 0.2, 5.0, 0.2):
        cost(budget, pause_s=pause_s, beside_s=[])
    assert budget.interval_s == pytest.approx(20.0)
    for _ in range(3):
        cost(budget, pause_s=0.4, beside_s=[])
    assert budget.interval_s == pytest.approx(40.0), "the last five count"


def test_a_slow_step_is_not_blamed_on_a_checkpoint_that_is_over() -> None:
    budget = Budget()
    cost(budget, pause_s=0.2, beside_s=[0.1])
    for _ in range(3):
        budget.stepped(9.0, is_writing=False)
    assert budget.interval_s == pytest.approx(20.0)
