"""Runs of `trainee` as subprocesses, alone or under torchrun, and the bits that they end with."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from committed import folder_of
from projects import ROOT
from shoal.storage import Storage
from shoal.tracking import RunRecord

STEPS = 100
TRAINEE = Path(__file__).with_name("trainee.py")


def train(
    num_workers: int,
    storage: Path,
    *names: str,
    kill: str = "",
    shards: int | None = None,
    checkpoints: bool = True,
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT / 'tests'}:{TRAINEE.parent}",
        "SHOAL_TEST_KILL": kill,
        "SHOAL_TEST_NO_CHECKPOINTS": "" if checkpoints else "1",
        "SHOAL_TEST_SHARDS": "" if shards is None else str(shards),
        "OMP_NUM_THREADS": "1",
    }
    agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    how = agent if num_workers > 1 else []
    command = [sys.executable, *how, str(TRAINEE), str(storage), str(STEPS), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def fingerprint_of(storage: Path, name: str, steps: int = STEPS) -> str:
    """SHA-256 over parameters, buffers, optimizer and scheduler after ``steps``."""
    folder = folder_of(RunRecord(Storage(storage), name), steps)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
