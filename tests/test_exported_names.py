"""The few names at the top level, frozen: adding or losing one is a decision."""

from __future__ import annotations

import pytest

import shoal


def test_the_top_level_names_are_these() -> None:
    assert sorted(shoal.__all__) == [
        "Cluster", "Datasets", "Model", "Recipe", "Run", "Session", "ShoalError", "__version__", "choice",
        "connect", "loguniform", "main", "maximize", "minimize", "randint", "uniform",
    ]  # fmt: skip


def test_every_name_loads_and_an_unknown_one_says_what_there_is() -> None:
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
    with pytest.raises(AttributeError, match="connect"):
        shoal.tuna  # noqa: B018
