"""Give a run the newest checkpoint of another to go on from. Loads no torch: a sweep's driver does it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError, NotFoundError
from shoal.storage import NO_TOKEN, Manifest, copy_committed, discard, reading
from shoal.tracking import RunRecord
from shoal.train.spec import Source
from shoal.train.stamp import check_stamp, checkpoint_folders, checkpoint_path, counting, step_of

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""A run that trains on deletes its old checkpoints, perhaps what is about to be copied; then there are newer ones."""


def adopt_checkpoint(source: RunRecord, target: RunRecord) -> Source:
    """Copy the newest checkpoint of ``source`` that verifies into the run ``target``; blocks until it is there.

    One of another run that was put among them is passed over. The copy is ``target``'s own: what becomes of
    ``source`` later does not matter to it. ``target`` must not have begun (`discard_leftovers`).

    Raises:
        NotFoundError: ``source`` has no such checkpoint.
        StorageError: the disk is full or not writable.
    """
    discard_leftovers(target)
    identity = source.identity()
    for _ in range(_ATTEMPTS):
        for path in reversed(counting(source.checkpoints_dir, source.fence.succession())):
            copy = checkpoint_path(target.checkpoints_dir, step_of(path), NO_TOKEN)
            try:
                manifest = _copy(path, copy, identity)
            except CorruptError as err:
                logger.info("not adopted: %s", err)
                continue
            return Source(run=source.name, step=int(manifest.meta["step"]), digest=manifest.digest)
    raise NotFoundError(f"run {source.name!r} has no checkpoint that verifies, so none can go on from it")


def _copy(checkpoint: Path, target: Path, identity: Mapping[str, Any] | None) -> Manifest:
    with reading(checkpoint):
        manifest = copy_committed(checkpoint, target)
    try:
        check_stamp(target, manifest, identity)
    except CorruptError:
        discard(target)
        raise
    return manifest


def discard_leftovers(run: RunRecord) -> None:
    """Delete what an `adopt_checkpoint` whose process died left in a run that never came to be.

    Else another run that gets the name would go on from it. A run that has an identity is left alone.

    Raises:
        StorageError: it cannot be deleted.
    """
    if run.identity() is None:
        for leftover in checkpoint_folders(run.checkpoints_dir):
            discard(leftover)
