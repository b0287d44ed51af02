"""Where a run's checkpoints are, for tests that look into one."""

from __future__ import annotations

from pathlib import Path

from shoal.tracking import RunRecord
from shoal.train.stamp import checkpoint_at


def folder_of(record: RunRecord, step: int) -> Path:
    """The checkpoint of a step that counts; there must be one."""
    found = checkpoint_at(record, step)
    assert found is not None, sorted(record.checkpoints_dir.glob("*"))
    return found
