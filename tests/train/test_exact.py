"""An exact run has the same bits on any number of workers, and when their number changes while it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet import KILLED, Fleet, Group
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from trainees import fingerprint_of

STEPS = 40
GROUP = Group(storage="", name="", workers=1, steps=STEPS, batch_size=20, shards=8)
"""A batch is no multiple of the number of shards, and each has two samples at least: BatchNorm needs them."""


def result_of(storage: Path, name: str) -> tuple[str, list[Any]]:
    """The bits, and what was measured on validation data by step; of a step that was repeated, the last."""
    events = RunRecord(Storage(storage), name).events(("eval",))
    evaluations = {event["step"]: (event["step"], event["values"]) for event in events}
    return fingerprint_of(storage, name, STEPS), list(evaluations.values())


@pytest.fixture(scope="module")
def alone(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a run that one worker finished undisturbed."""
    storage = tmp_path_factory.mktemp("exact")
    fleet.train_elastic(replace(GROUP, storage=str(storage), name="alone"))
    return storage


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_bits(fleet: Fleet, alone: Path, num_workers: int) -> None:
    name = f"on-{num_workers}"
    fleet.train_elastic(replace(GROUP, storage=str(alone), name=name, workers=num_workers))
    assert result_of(alone, name) == result_of(alone, "alone")


def test_killed_on_three_workers_it_goes_on_with_two_to_the_same_bits(fleet: Fleet, alone: Path) -> None:
    group = replace(GROUP, storage=str(alone), name="resized", workers=3)
    dying = replace(group, die_at_step=17, who_dies=[1], checkpoint_every_s=0.001)
    assert fleet.train(dying)[1] == KILLED
    record = fleet.train_elastic(replace(group, workers=2))
    starts = record.events(("start",))
    assert [start["workers"] for start in starts] == [3, 2]
    assert starts[1]["step"] > 0
    assert record.state() == RunState.FINISHED
    assert not [event for event in record.events(("warning",)) if "workers" in event["message"]]
    assert result_of(alone, "resized") == result_of(alone, "alone")
