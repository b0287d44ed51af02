from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import CorruptError, RecipeError
from shoal.train.state import flatten, unflatten

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
nests = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(nests)
def test_a_nest_comes_back_through_json_with_its_types(nest: Any) -> None:
    flat = flatten(nest, what="it")
    back = unflatten(json.loads(json.dumps(flat.skeleton)), flat.tensors)
    assert back == nest
    assert repr(back) == repr(nest)  # equality alone takes 1 for True and 1.0 for 1


def test_an_optimizers_state_comes_back() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    flat = flatten(optimizer.state_dict(), what="the optimizer")
    back = unflatten(json.loads(json.dumps(flat.skeleton)), flat.tensors)
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(back)
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(fresh.state_dict()["state"][0][name], value)


def test_what_needs_code_to_load_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"the optimizer keeps a set at /groups/0"):
        flatten({"groups": [{1, 2}]}, what="the optimizer")


def test_a_skeleton_that_names_a_missing_tensor_is_corrupt() -> None:
    with pytest.raises(CorruptError, match="does not hold: /a"):
        unflatten({"tensor": "/a"}, {})
