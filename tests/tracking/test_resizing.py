"""The wish for a number of workers, and the order to them, as files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.config import Range
from shoal.errors import CorruptError
from shoal.tracking import Resizing, Wish

WISH = Wish(workers=Range(1, 4), most=3, per_worker={"CPU": 1.0, "GPU": 0.5})


def test_a_wish_is_read_back_and_replaced(tmp_path: Path) -> None:
    assert Resizing(tmp_path).wish() is None
    Resizing(tmp_path).begin(WISH)
    assert Resizing(tmp_path).wish() == WISH
    Resizing(tmp_path).ask(replace(WISH, workers=Range(2, 2)))
    assert Resizing(tmp_path).wish() == replace(WISH, workers=Range(2, 2))


def test_a_driver_that_cannot_resize_leaves_no_wish(tmp_path: Path) -> None:
    Resizing(tmp_path).begin(WISH)
    Resizing(tmp_path).begin(None)
    assert Resizing(tmp_path).wish() is None


def test_a_range_ends_at_the_most_there_can_be_but_a_least_beyond_it_is_no_wish_of_ours() -> None:
    assert WISH.reachable == Range(1, 3)
    assert replace(WISH, workers=Range(2, 2)).reachable == Range(2, 2)
    assert replace(WISH, workers=Range(4, 9)).reachable == Range(4, 4)


@pytest.mark.parametrize(
    "damage",
    [
        {"workers": "0..4"},
        {"workers": "4..1"},
        {"workers": None},
        {"workers": True},
        {"most": 0},
        {"most": "3"},
        {"per_worker": ["CPU"]},
        {"per_worker": {"CPU": "many"}},
    ],
)
def test_a_damaged_wish_is_named(tmp_path: Path, damage: dict[str, object]) -> None:
    Resizing(tmp_path).begin(WISH)
    path = tmp_path / "workers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(CorruptError, match=r"workers\.json is damaged"):
        Resizing(tmp_path).wish()


def test_an_order_is_for_one_attempt(tmp_path: Path) -> None:
    files = Resizing(tmp_path)
    assert files.ordered(2) is None
    files.order(2, 3)
    assert [files.ordered(attempt) for attempt in (1, 2, 3)] == [None, 3, None]
    files.order(3, 1)
    assert [files.ordered(attempt) for attempt in (2, 3)] == [None, 1]
    files.withdraw()
    files.withdraw()
    assert files.ordered(3) is None


def test_a_driver_that_begins_finds_no_order(tmp_path: Path) -> None:
    Resizing(tmp_path).order(1, 3)
    Resizing(tmp_path).begin(WISH)
    assert Resizing(tmp_path).ordered(1) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"attempt": 1}', '{"attempt": 1, "workers": 0}', "3"])
def test_an_order_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "resize.json").write_text(content)
    assert Resizing(tmp_path).ordered(1) is None
