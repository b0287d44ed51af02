"""An exact run has the same bits on any number of workers, and when their number changes while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from trainees import fingerprint_of, train

SHARDS = 8
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def evaluations_of(storage: Path, name: str) -> list[Any]:
    """What was measured on validation data, by step; of a step that was repeated, the last."""
    events = RunRecord(Storage(storage), name).events(("eval",))
    return list({event["step"]: (event["step"], event["values"]) for event in events}.values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a run that one worker finished undisturbed."""
    storage = tmp_path_factory.mktemp("exact")
    done = train(1, storage, "alone", shards=SHARDS)
    assert done.returncode == 0, done.stderr
    return storage


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_bits(num_workers: int, alone: Path) -> None:
    name = f"on-{num_workers}"
    done = train(num_workers, alone, name, shards=SHARDS)
    assert done.returncode == 0, done.stderr
    assert fingerprint_of(alone, name) == fingerprint_of(alone, "alone")
    assert evaluations_of(alone, name) == evaluations_of(alone, "alone")


def test_killed_on_three_workers_it_goes_on_with_two_to_the_same_bits(alone: Path) -> None:
    first = train(3, alone, "resized", kill="1:37", shards=SHARDS)
    assert first.returncode != 0
    second = train(2, alone, "resized", shards=SHARDS)
    assert second.returncode == 0, second.stderr
    record = RunRecord(Storage(alone), "resized")
    starts = record.events(("start",))
    assert [start["workers"] for start in starts] == [3, 2]
    assert 0 < starts[1]["step"] <= 37
    assert record.state() == RunState.FINISHED
    assert not [event for event in record.events(("warning",)) if "workers" in event["message"]]
    assert fingerprint_of(alone, "resized") == fingerprint_of(alone, "alone")
    assert evaluations_of(alone, "resized") == evaluations_of(alone, "alone")
