"""Storage that fails, and processes that die, on purpose."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shoal.storage import Disk, Manifest, commit

CONTENT = {
    "weights.bin": bytes(range(48)),
    "state.json": b'{"step": 7}\n',
    "parts/rank-0": b"",
    "parts/rank-1": b"x",
}


class SteppedDisk(Disk):
    """Calls ``on_step(number, name)`` before each call of `Disk`, counting from 0; it may raise or exit."""

    def __init__(self, on_step: Callable[[int, str], None]) -> None:
        self.steps: list[str] = []
        self._on_step = on_step

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return partial(self._run, name, found) if name in vars(Disk) and name[0] != "_" else found

    def _run(self, name: str, call: Callable[..., None], *args: Any) -> None:
        self.steps.append(name)
        self._on_step(len(self.steps) - 1, name)
        call(*args)


def failing_disk(step: int, number: int = errno.ENOSPC) -> SteppedDisk:
    """A disk whose call ``step`` raises OSError, and only that one, so that cleaning up works."""

    def fail(current: int, name: str) -> None:
        if current == step:
            raise OSError(number, os.strerror(number))

    return SteppedDisk(fail)


def dying_disk(step: int) -> SteppedDisk:
    """A disk that kills its process just before call ``step``."""

    def die(current: int, name: str) -> None:
        if current == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return SteppedDisk(die)


def write_content(target: Path) -> None:
    (target / "parts").mkdir()
    for name, content in CONTENT.items():
        (target / name).write_bytes(content)


def commit_content(directory: Path, *, disk: Disk | None = None) -> Manifest:
    return commit(directory, write_content, meta={"step": 7, "sizes": [1, 2]}, disk=disk or Disk())


def num_steps(run: Callable[[Disk], object]) -> int:
    """How many calls of `Disk` ``run`` makes."""
    disk = SteppedDisk(lambda number, name: None)
    run(disk)
    return len(disk.steps)


def in_child(action: Callable[[], object]) -> int:
    """Run ``action`` in a forked process; its exit status as `os.waitstatus_to_exitcode` gives it."""
    return wait_child(start_child(action))


def start_child(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def wait_child(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
