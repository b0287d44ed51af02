"""kill -9 of a rank, then the same command: the weights are those of a run that was never disturbed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from projects import ROOT
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.train.stamp import checkpoint_path

STEPS = 100
TRAINEE = Path(__file__).with_name("trainee.py")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def train(num_workers: int, storage: Path, *names: str, kill: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT / 'tests'}:{TRAINEE.parent}",
        "SHOAL_TEST_KILL": kill,
        "OMP_NUM_THREADS": "1",
    }
    agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    how = agent if num_workers > 1 else []
    command = [sys.executable, *how, str(TRAINEE), str(storage), str(STEPS), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def fingerprint_of(storage: Path, name: str) -> str:
    """SHA-256 over parameters, optimizer, scheduler and every rank's random state at the last step."""
    folder = checkpoint_path(RunRecord(Storage(storage), name).checkpoints_dir, STEPS)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


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
