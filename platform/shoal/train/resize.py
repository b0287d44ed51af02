"""Ask a run that is being trained for another number of workers; what cannot be is refused here."""

from __future__ import annotations

import sys
from dataclasses import replace

from shoal.capacity import Resources, grant, snapshot
from shoal.config import Range
from shoal.errors import RequestError
from shoal.storage import FileLock
from shoal.tracking import RunRecord, Wish
from shoal.train.options import RULES


def resize(record: RunRecord, workers: int | str | Range) -> Range:
    """Wish that the run had so many workers; returns what was asked, at once: its driver does it when there is room.

    Raises:
        RequestError: no number and no range of workers; more than the run can ever have, or than fit into the cluster
            that this process is attached to; the run is not being trained, or without a driver that could do it.
        CorruptError, StorageError: the run's files cannot be read or written.
    """
    rule = RULES["workers"]
    if not rule.fits(workers):
        raise RequestError(f"workers={workers!r}: {rule.valid}")
    asked = Range.parse(workers)
    wish = _wish_of(record, asked)
    if asked.max > wish.most:
        raise RequestError(f"workers={asked}: {_limit_of(record, wish)}; ask for 1 to {wish.most}")
    _check_fit(asked, wish.per_worker)
    record.resizing.ask(replace(wish, workers=asked))
    return asked


def _wish_of(record: RunRecord, asked: Range) -> Wish:
    """What the run's driver was asked for so far."""
    if not record.is_locked():
        raise RequestError(
            f"run {record.name!r} is not being trained ({record.state()} at step {record.step:,}): "
            f"start it with so many workers: workers={str(asked)!r} (--workers {asked})"
        )
    wish = record.resizing.wish() if FileLock(record.driver_lock_path).is_held() else None
    if wish is not None:
        return wish
    trial = record.trial()
    who = (
        f"it is trial {trial[1]} of sweep {trial[0]!r}, whose trials all have the same number"
        if trial is not None
        else "it has no driver that could start others (torchrun's --nproc-per-node decides)"
    )
    raise RequestError(
        f"workers={asked}: run {record.name!r} keeps the workers it was started with: {who}. "
        f"Stop it (shoal stop {record.name}) and start it with another number"
    )


def _limit_of(record: RunRecord, wish: Wish) -> str:
    shards = (record.identity() or {}).get("shards")
    if shards is None:
        return f"a batch of run {record.name!r} has {wish.most} samples, and no more workers can share it"
    return f"run {record.name!r} is exact and has {shards} shards, and no more workers can share them"


def _check_fit(asked: Range, per_worker: Resources) -> None:
    """Refuse what could never start, where that can be known: in a process that is attached to a cluster."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        grant(snapshot(with_holders=True), asked, per_worker)
