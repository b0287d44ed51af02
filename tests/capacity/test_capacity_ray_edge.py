"""The contract with the private part of Ray that says what is free on each node."""

from __future__ import annotations

import importlib
import inspect


def test_ray_still_says_what_is_free_per_node() -> None:
    state = importlib.import_module("ray._private.state")
    found = getattr(state, "available_resources_per_node", None)
    assert found is not None, "moved: see platform/shoal/capacity/ray_edge.py"
    assert not inspect.signature(found).parameters
