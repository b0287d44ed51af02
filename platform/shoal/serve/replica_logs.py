"""What replicas print lies on storage and outlives them; this keeps it from growing for ever."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

NUM_KEPT = 50
"""Newest files that are kept, of all apps together; Ray bounds the size of each."""

logger = logging.getLogger(__name__)


def prune(folder: Path, *, live: Collection[str], keep: int = NUM_KEPT) -> None:
    """Delete all but the ``keep`` newest files of replicas; those of ``live`` ones (their ids) stay in any case.

    Best effort and safe to repeat: a file that cannot be deleted stays, with a warning in the log.
    """
    try:
        files = sorted(folder.glob("replica_*.log*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in files[keep:]:
            if not any(f"_{replica}." in path.name for replica in live):
                path.unlink(missing_ok=True)
    except OSError:
        logger.warning("old logs of replicas are left in %s", folder, exc_info=True)
