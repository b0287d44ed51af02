"""kill -9 of a rank, then the same command: the weights are those of a run that was never disturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fleet import KILLED, Fleet, Group
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from trainees import fingerprint_of

STEPS = 40


@pytest.mark.parametrize(
    ("num_workers", "checkpoint_every_s", "shards"),
    [
        (1, 0.001, None),
        (3, 0.001, None),  # what breaks two breaks three, whose sums have an order
        (3, 1e6, None),
        (3, 1e6, 8),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    fleet: Fleet, tmp_path: Path, num_workers: int, checkpoint_every_s: float, shards: int | None
) -> None:
    """Of several workers the survivors keep the step boundary, so no step is lost; one alone has its checkpoints."""
    victim, step = num_workers - 1, 23
    group = Group(
        storage=str(tmp_path), name="killed", workers=num_workers, steps=STEPS, batch_size=20, shards=shards
    )
    fleet.train_elastic(replace(group, name="undisturbed"))
    dying = replace(group, die_at_step=step, who_dies=[victim], checkpoint_every_s=checkpoint_every_s)
    assert fleet.train(dying)[victim] == KILLED
    record = RunRecord(Storage(tmp_path), "killed")
    assert record.state() == RunState.INTERRUPTED
    fleet.train_elastic(group)
    starts = [start["step"] for start in record.events(("start",))]
    assert starts == [0, step] if checkpoint_every_s > 1 else starts[1] > 0
    assert record.state() == RunState.FINISHED
    assert fingerprint_of(tmp_path, "killed", STEPS) == fingerprint_of(tmp_path, "undisturbed", STEPS)
