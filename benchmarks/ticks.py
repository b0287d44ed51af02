"""A counter of steps in a file: one process ticks, another reads it at any time."""

from __future__ import annotations

import functools
import mmap
import struct
import time
from pathlib import Path
from typing import NamedTuple

_LAYOUT = struct.Struct("=qd")


class Tick(NamedTuple):
    """How many there were, and when the last was, on the machine's monotonic clock in seconds."""

    count: int
    at: float


def tick(path: str) -> None:
    """Count one more, now."""
    file = _open(path)
    _LAYOUT.pack_into(file, 0, _LAYOUT.unpack_from(file)[0] + 1, time.monotonic())


def read(path: Path) -> Tick:
    """The newest tick; a count of 0 before the first."""
    content = path.read_bytes() if path.exists() else b""
    return Tick(*_LAYOUT.unpack(content)) if len(content) == _LAYOUT.size else Tick(0, 0.0)


@functools.cache
def _open(path: str) -> mmap.mmap:
    with open(path, "w+b") as file:
        file.write(bytes(_LAYOUT.size))
        file.flush()
        return mmap.mmap(file.fileno(), _LAYOUT.size)
