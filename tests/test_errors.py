"""The one error tree: drawn as it is, and found again by the names that records hold."""

from __future__ import annotations

import re

import pytest

from shoal import errors
from shoal.errors import ConfigError, InternalError, RecipeError, RequestError, ShoalError, from_name

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShoalError)]


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn, parents = {}, ["ShoalError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:│   |    )*)[├└]── (\w+)", line):
            depth = len(found[1]) // 4
            parents[depth + 1 :] = [found[2]]
            drawn[found[2]] = parents[depth]
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in TREE if kind is not ShoalError}


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not ConfigError])
def test_a_failure_is_found_again_by_its_name(kind: type[ShoalError]) -> None:
    error = from_name(kind.__name__, "all is lost", traceback_text="Traceback")
    assert (type(error), str(error)) == (kind, "all is lost")
    assert not isinstance(error, RecipeError) or error.traceback_text == "Traceback"


def test_the_problems_of_a_config_were_not_recorded() -> None:
    error = from_name("ConfigError", "cluster.yaml: 1 problem")
    assert (type(error), str(error)) == (RequestError, "cluster.yaml: 1 problem")


@pytest.mark.parametrize("kind", ["", "None", "Sequence", "from_name", "KeyError"])
def test_a_name_outside_the_tree_is_our_bug(kind: str) -> None:
    assert type(from_name(kind, "odd")) is InternalError
