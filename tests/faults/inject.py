"""How a worker dies: armed with a fault, it kills itself where the fault says. One process, one armed fault."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from faults.plan import Fault, Point

_WRITES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate")
_UNLIMITED = resource.RLIM_INFINITY

_storage = ""
_armed: Fault | None = None
_num_writes = 0


def watch(storage: Path) -> None:
    """See from now on what this process changes under ``storage``. Once per process: Python takes no hook off."""
    global _storage
    assert not _storage, "watched already"
    _storage = str(storage)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would see EFBIG instead
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_on_event)


def arm(fault: Fault | None) -> None:
    """Die of this fault; None of none. The one before is forgotten."""
    global _armed, _num_writes
    _armed, _num_writes = fault, 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (_UNLIMITED, _UNLIMITED))
    if fault is not None and fault.point == "bytes" and not fault.file:
        _limit(fault.at)


def reach(point: Point, at: int = 0) -> None:
    """The process is at this point now; returns unless it is to die there."""
    if _armed is not None and (_armed.point, _armed.at) == (point, at):
        os.kill(os.getpid(), signal.SIGKILL)


def num_writes() -> int:
    """Changes of the disk since `arm`."""
    return _num_writes


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    """Python tells of what it is about to do; the C and Rust code of libraries does not."""
    global _num_writes
    if event != "open" and event not in _WRITES:
        return
    if not isinstance(args[0], str | bytes | Path):
        return
    path = os.fsdecode(args[0])
    if not path.startswith(_storage):
        return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    reach("write", _num_writes)
    _num_writes += 1
    if _armed is not None and _armed.file and _armed.file in os.path.basename(path):
        _limit(_armed.at)


def _limit(size_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, _UNLIMITED))
