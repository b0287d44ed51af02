"""What is tried next."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState

import shoal
from shoal.tune.search import Search
from shoal.tune.space import choice, loguniform, randint, uniform

SPACE = {"lr": loguniform(1e-4, 1e-1), "width": randint(4, 64), "kind": choice(["a", ["b", 2]])}
LOW = shoal.minimize("loss")


def test_suggestions_lie_in_the_space() -> None:
    search = Search(SPACE, LOW, seed=0)
    for _ in range(12):
        fields = search.ask()
        assert fields is not None
        assert 1e-4 <= fields["lr"] <= 1e-1
        assert fields["width"] in range(4, 65)
        assert fields["kind"] in ("a", ["b", 2])
        search.tell(fields, "finished", fields["lr"])


def test_the_same_seed_searches_the_same_way() -> None:
    def first_three(seed: int) -> list[object]:
        search = Search(SPACE, LOW, seed=seed)
        return [search.ask() for _ in range(3)]

    assert first_three(1) == first_three(1)
    assert first_three(1) != first_three(2)


def test_a_resumed_search_goes_on_where_it_was() -> None:
    whole, first = Search(SPACE, LOW, seed=3), Search(SPACE, LOW, seed=3)
    told = []
    for _ in range(4):
        fields = whole.ask()
        assert fields is not None
        whole.tell(fields, "finished", fields["lr"])
        told.append(first.ask())
    resumed = Search(SPACE, LOW, seed=3)
    for fields in told:
        assert fields is not None
        resumed.tell(fields, "finished", fields["lr"])
    assert resumed.ask() == whole.ask()


def test_it_learns() -> None:
    search = Search({"x": uniform(-10, 10)}, shoal.maximize("y"), seed=0)
    values = []
    for _ in range(40):
        fields = search.ask()
        assert fields is not None
        values.append(-((fields["x"] - 3) ** 2))
        search.tell(fields, "finished", values[-1])
    assert (
        sum(values[-10:]) > sum(values[:10]) / 4
    )  # squared distances shrink, or the objective is upside down


def test_a_finite_space_is_searched_once() -> None:
    search = Search({"a": choice([1, 2, 3]), "b": choice([True, False])}, LOW, seed=0)
    seen = []
    while (fields := search.ask()) is not None:
        seen.append((fields["a"], fields["b"]))
        search.tell(fields, "failed" if len(seen) == 2 else "finished", 1.0)
    assert sorted(seen) == sorted((a, b) for a in (1, 2, 3) for b in (True, False))
    assert search.is_exhausted


def test_a_sampler_that_insists_on_one_place_of_a_huge_range_is_led_elsewhere() -> None:
    """The best is at the range's end, where few whole numbers are; listing all of it took the machine's memory."""
    search = Search({"n": randint(1, 10**9, log=True)}, LOW, seed=0)
    seen = []
    for _ in range(14):
        fields = search.ask()
        assert fields is not None
        seen.append(fields["n"])
        search.tell(fields, "finished", float(fields["n"]))
    assert len(set(seen)) == 14
    assert all(type(number) is int and 1 <= number <= 10**9 for number in seen)


def test_an_unfinished_trial_is_asked_for_again() -> None:
    search = Search(SPACE, LOW, seed=0)
    fields = {"lr": 0.01, "width": 5, "kind": ["b", 2]}
    assert search.resume(fields) == fields
    search.tell(fields, "pruned", 0.5, step=10)
    assert [trial.state for trial in search._study.trials] == [TrialState.PRUNED]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_trial_without_a_measurement_is_a_failure(value: float | None) -> None:
    search = Search(SPACE, LOW, seed=0)
    fields = search.ask()
    assert fields is not None
    search.tell(fields, "finished", value)
    assert [trial.state for trial in search._study.trials] == [TrialState.FAIL]
