"""Which steps each rank has completed, in a small file per rank: the rank writes it, anybody reads it at any time."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

_LAYOUT = struct.Struct("=qqdqd")
_LAST = struct.Struct("=qd")
_OFFSET_OF_LAST = _LAYOUT.size - _LAST.size


class Steps(NamedTuple):
    """Of the newest process that is a rank. Steps count from 1; times are of the monotonic clock, in seconds."""

    pid: int
    first: int
    """The first step that this very process completed as this rank."""
    first_at: float
    last: int
    last_at: float


_mine: tuple[Path, mmap.mmap] | None = None
"""The file that this process writes."""


def completed(folder: str, rank: int, step: int) -> None:
    """Note that this process, as ``rank``, has completed ``step``, just now."""
    global _mine
    path, now = _path(Path(folder), rank), time.monotonic()
    if _mine is None or _mine[0] != path:
        _mine = path, _create(path, Steps(os.getpid(), step, now, step, now))
    _LAST.pack_into(_mine[1], _OFFSET_OF_LAST, step, now)


def read(folder: Path, rank: int) -> Steps | None:
    """What the rank has noted last; None before its first step."""
    path = _path(folder, rank)
    return Steps(*_LAYOUT.unpack(path.read_bytes())) if path.exists() else None


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def _create(path: Path, steps: Steps) -> mmap.mmap:
    """A file of its own that appears whole: whoever was this rank before may still write into the last one."""
    partial = path.with_name(f"{path.name}.{steps.pid}")
    with open(partial, "w+b") as file:
        file.write(_LAYOUT.pack(*steps))
        file.flush()
        mapped = mmap.mmap(file.fileno(), _LAYOUT.size)
    partial.replace(path)
    return mapped
