"""A name is claimed once; what differs is told leaf by leaf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CorruptError, IdentityError, NotFoundError
from shoal.storage import StopMark, claim, differences


def claim_here(folder: Path, **identity: Any) -> bool:
    return claim(folder / "a" / "who.json", identity, what="thing 'a'", advice="Ask for what it has.")


def test_a_name_is_claimed_once(tmp_path: Path) -> None:
    assert claim_here(tmp_path, seed=1, hidden=(64, 64))
    assert not claim_here(tmp_path, hidden=(64, 64), seed=1)


def test_another_identity_is_refused_leaf_by_leaf(tmp_path: Path) -> None:
    claim_here(tmp_path, seed=1, space={"lr": {"low": 0.1, "log": True}, "depth": 2})
    with pytest.raises(IdentityError) as refused:
        claim_here(tmp_path, seed=True, space={"lr": {"low": 0.2, "log": True}, "depth": 2})
    assert str(refused.value).splitlines() == [
        "thing 'a' exists with another identity:",
        "  seed: it has 1, you asked for true",
        "  space.lr.low: it has 0.1, you asked for 0.2",
        "Ask for what it has.",
    ]


def test_a_damaged_identity_is_not_taken_for_a_free_name(tmp_path: Path) -> None:
    claim_here(tmp_path, seed=1)
    (tmp_path / "a" / "who.json").write_text("{")
    with pytest.raises(CorruptError, match=r"who\.json"):
        claim_here(tmp_path, seed=1)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": float("nan")}, {"a": float("nan")}, []),
        ({"a": 1}, {"a": True}, [("a", "1", "true")]),
        ({"a": None}, {}, [("a", "null", "nothing")]),
        ({}, {"a": {"b": 1}}, [("a", "nothing", '{"b": 1}')]),
        ({"a": {}}, {"a": {"b": "x"}}, [("a.b", "nothing", '"x"')]),
        ([1, 2], [1, 3], [("", "[1, 2]", "[1, 3]")]),
    ],
)
def test_differences(old: Any, new: Any, found: list[tuple[str, str, str]]) -> None:
    assert differences(old, new) == found


def test_a_stop_is_wished_for_until_it_is_cleared(tmp_path: Path) -> None:
    mark = StopMark(tmp_path)
    mark.clear()
    assert not mark.is_set()
    mark.set()
    mark.set()
    assert StopMark(tmp_path).is_set()
    mark.clear()
    assert not mark.is_set()


def test_what_is_not_there_cannot_be_stopped(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="gone"):
        StopMark(tmp_path / "gone").set()
    assert not (tmp_path / "gone").exists()
