"""kill -9 of a rank, then the same command: the weights are those of a run that was never disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from trainees import fingerprint_of, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("num_workers", [1, 3])  # what breaks two breaks three, whose sums have an order
def test_a_killed_run_ends_with_the_same_bits(num_workers: int, tmp_path: Path) -> None:
    first = train(num_workers, tmp_path, "undisturbed", "killed", kill=f"{num_workers - 1}:57")
    assert first.returncode != 0
    assert RunRecord(Storage(tmp_path), "undisturbed").state() == RunState.FINISHED, first.stderr
    killed = RunRecord(Storage(tmp_path), "killed")
    assert killed.state() == RunState.INTERRUPTED
    second = train(num_workers, tmp_path, "killed")
    assert second.returncode == 0, second.stderr

    starts = killed.events(("start",))
    assert [start["step"] == 0 for start in starts] == [True, False], (
        "the second attempt starts from a checkpoint"
    )
    assert 0 < starts[1]["step"] <= 57
    assert killed.state() == RunState.FINISHED
    assert fingerprint_of(tmp_path, "killed") == fingerprint_of(tmp_path, "undisturbed")


@pytest.mark.parametrize(
    ("victim", "shards"),
    [
        ("0:23", None),
        pytest.param("2:57", None, marks=pytest.mark.chaos),
        pytest.param("0:37", 8, marks=pytest.mark.chaos),
    ],
)
def test_a_survivor_keeps_the_step_boundary_so_no_step_is_lost(
    victim: str, shards: int | None, tmp_path: Path
) -> None:
    first = train(3, tmp_path, "undisturbed", "killed", kill=victim, shards=shards, checkpoints=False)
    assert first.returncode != 0
    second = train(3, tmp_path, "killed", shards=shards, checkpoints=False)
    assert second.returncode == 0, second.stderr
    killed = RunRecord(Storage(tmp_path), "killed")
    assert [start["step"] for start in killed.events(("start",))] == [0, int(victim.partition(":")[2])]
    assert killed.state() == RunState.FINISHED
    assert fingerprint_of(tmp_path, "killed") == fingerprint_of(tmp_path, "undisturbed")
