"""Search spaces: the shell's words, what fits a recipe, every problem at once."""

from __future__ import annotations

import math

import pytest
from searched import Line

from shoal.errors import RequestError
from shoal.tune.space import (
    Choice,
    Integers,
    Uniform,
    check_space,
    choice,
    describe_space,
    loguniform,
    num_combinations,
    parse_space,
    randint,
    uniform,
)


def test_words_of_the_shell() -> None:
    words = ["lr=log:1e-4..1e-1", "hidden=64,128", "dropout=0.0..0.5", "layers=1..4", "wd=1e-2", "data=../x"]
    fixed, space = parse_space(words)
    assert fixed == {"wd": "1e-2", "data": "../x"}
    assert space == {
        "lr": Uniform(1e-4, 1e-1, log=True),
        "hidden": Choice(("64", "128")),
        "dropout": Uniform(0.0, 0.5),
        "layers": Integers(1, 4),
    }


def test_wrong_words_are_all_named() -> None:
    with pytest.raises(RequestError) as caught:
        parse_space(["lr", "lr=1e-3", "lr=1e-2", "wd=log:abc", "=3"])
    message = str(caught.value)
    assert message.startswith("the search space has 4 problems")
    assert all(part in message for part in ("'lr' is not", "lr: given twice", "'log:abc'", "'=3'"))


def test_values_take_the_type_of_their_field() -> None:
    _, space = parse_space(["width=64,128,64", "bias=true,false", "lr=0..1"])
    checked = check_space(Line(), space)
    assert checked == {"width": Choice((64, 128)), "bias": Choice((True, False)), "lr": Uniform(0.0, 1.0)}
    assert [type(value) for value in checked["width"].values] == [int, int]  # type: ignore[union-attr]


@pytest.mark.parametrize("high", [513, 1_000_001, 2**53])  # 0.381966 of a million is a whole number
def test_whole_numbers_stay_whole(high: int) -> None:
    domain = randint(1, high, log=True)
    assert check_space(Line(), {"width": domain}) == {"width": domain}


def test_every_problem_at_once() -> None:
    space = {
        "learning_rate": loguniform(1e-4, 1e-1),
        "widht": choice([1]),
        "width": uniform(1.0, 8.0),
        "lr": loguniform(0.0, 1.0),
        "bias": choice([]),
        "batch_size": randint(64, 8),
        "kind": 3,
    }
    with pytest.raises(RequestError) as caught:
        check_space(Line(), space)  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    assert lines[0] == "the search space has 7 problems:"
    text = "\n".join(lines)
    for part in (
        "learning_rate: no such field",
        "widht: no such field; did you mean width?",
        "width: Input should be a valid integer",
        "lr: the range log:0..1 is by orders of magnitude and must begin above 0",
        "bias: a choice of nothing",
        "batch_size: the range 64..8 must have two finite ends, the lower one first",
        "kind: 3 is not a domain",
    ):
        assert part in text


@pytest.mark.parametrize("high", [math.inf, math.nan, 1e-4])
def test_ranges_end(high: float) -> None:
    with pytest.raises(RequestError, match="two finite ends"):
        check_space(Line(), {"lr": uniform(1e-4, high)})


@pytest.mark.parametrize(
    "word",
    ["width=1..9007199254740993", "width=1.." + "9" * 400, "width=1.." + "9" * 5000, "lr=-1e308..1e308"],
)
def test_ranges_that_no_sampler_can_reckon_with(word: str) -> None:
    with pytest.raises(RequestError, match="two finite ends"):
        check_space(Line(), parse_space([word])[1])


def test_nothing_to_search() -> None:
    with pytest.raises(RequestError, match="nothing to search"):
        check_space(Line(), {})


def test_size_and_description() -> None:
    space = {"width": randint(1, 3), "kind": choice(["a", "b"])}
    assert num_combinations(space) == 6
    assert num_combinations({**space, "lr": uniform(0, 1)}) == math.inf
    assert describe_space(space) == {
        "width": {"integers": [1, 3], "log": False},
        "kind": {"choice": ["a", "b"]},
    }
