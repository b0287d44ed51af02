"""The bits that a run ends with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from committed import folder_of
from shoal.storage import Storage
from shoal.tracking import RunRecord


def fingerprint_of(storage: Path, name: str, steps: int) -> str:
    """SHA-256 over parameters, buffers, optimizer and scheduler after ``steps``."""
    folder = folder_of(RunRecord(Storage(storage), name), steps)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
