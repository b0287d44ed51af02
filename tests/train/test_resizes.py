"""Workers that are resized while they train: no step is lost, no sample seen twice, exact runs keep their bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet import KILLED, RAISED, Fleet, Group
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from toy_elastic import samples_by_step
from trainees import fingerprint_of

STEPS = 30
EXACT = {"batch_size": 14, "shards": 5, "steps": STEPS}
"""70 samples: an epoch has 5 steps. Shards of 2 and 3 samples; BatchNorm takes two at least."""


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits of an exact run that one worker finished."""
    storage = tmp_path_factory.mktemp("undisturbed")
    fleet.train_elastic(Group(storage=str(storage), name="alone", workers=1, **EXACT))
    return fingerprint_of(storage, "alone", STEPS)


def history_of(record: RunRecord) -> list[tuple[Any, ...]]:
    """(step, workers) of each start, (step, from, to) of each resize, (step, state) of each end."""
    return [
        (event["step"], *(event[name] for name in ("workers", "from", "to", "state") if name in event))
        for event in record.events(("start", "resize", "end"))
    ]


def test_two_one_three_workers_leave_the_bits_of_an_undisturbed_run(
    fleet: Fleet, undisturbed: str, tmp_path: Path
) -> None:
    group = Group(storage=str(tmp_path), name="run", workers=2, resizes={7: 1, 18: 3}, **EXACT)
    record = fleet.train_elastic(group)
    assert history_of(record) == [
        (0, 2), (8, 2, 1), (8, 1), (19, 1, 3), (19, 3), (STEPS, "finished"),
    ]  # fmt: skip
    assert [event["kind"] for event in record.events(("warning", "rejected"))] == []
    assert fingerprint_of(tmp_path, "run", STEPS) == undisturbed


def test_a_fast_run_sees_every_sample_of_an_epoch_once(fleet: Fleet, tmp_path: Path) -> None:
    group = Group(
        storage=str(tmp_path), name="run", workers=1, resizes={3: 3, 11: 2}, steps=STEPS, batch_size=14
    )
    record = fleet.train_elastic(group)
    assert record.state() is RunState.FINISHED
    assert [start["workers"] for start in record.events(("start",))] == [1, 3, 2]
    seen = samples_by_step(record)
    assert list(seen) == list(range(STEPS))
    for epoch in range(0, STEPS, 5):
        samples = [sample for step in range(epoch, epoch + 5) for sample in seen[step]]
        assert sorted(samples) == list(range(70))


@pytest.mark.parametrize("moment", ["ordered", "committed", "written"])
def test_killed_at_any_moment_of_a_resize_it_goes_on_to_the_same_bits(
    fleet: Fleet, undisturbed: str, tmp_path: Path, moment: str
) -> None:
    group = Group(storage=str(tmp_path), name="run", workers=2, resizes={7: 3}, kill_at=moment, **EXACT)
    peer = 0 if moment == "written" else RAISED  # it asks to be started again unless the attempt was over
    assert fleet.train(group) == [KILLED, peer]
    record = RunRecord(Storage(tmp_path), "run")
    assert record.state() is RunState.INTERRUPTED
    again = fleet.train_elastic(replace(group, workers=1, resizes={}, kill_at=""))
    assert again.state() is RunState.FINISHED
    assert history_of(again)[-2] == (8, 1), "who is left commits the boundary"
    assert fingerprint_of(tmp_path, "run", STEPS) == undisturbed


@settings(max_examples=4, deadline=None)
@given(
    first=st.integers(1, 3),
    resizes=st.dictionaries(st.integers(0, STEPS - 1), st.integers(1, 3), max_size=4),
)
def test_any_resizes_leave_the_bits_of_an_undisturbed_run(
    fleet: Fleet,
    undisturbed: str,
    tmp_path_factory: pytest.TempPathFactory,
    first: int,
    resizes: dict[int, int],
) -> None:
    storage = tmp_path_factory.mktemp("resizes")
    group = Group(storage=str(storage), name="run", workers=first, resizes=resizes, **EXACT)
    record = fleet.train_elastic(group)
    sizes = [first, *(resizes[step] for step in sorted(resizes) if step < STEPS - 1)]
    assert [start["workers"] for start in record.events(("start",))] == sizes
    assert list(samples_by_step(record)) == list(range(STEPS))
    assert fingerprint_of(storage, "run", STEPS) == undisturbed
