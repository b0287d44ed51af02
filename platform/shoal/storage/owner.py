"""Who is writing: names for temporary files that tell whether their writer still lives."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

FOREIGN_AFTER_S = 24 * 3600.0
"""A temporary file of another machine, whose processes we cannot see, counts as abandoned after this long
without a change."""

_OWNER = r"([0-9a-f]{8})-([0-9a-f]{8})-([0-9]+)-([0-9]+)"
_TEMPORARY = re.compile(rf"^\..*\.(?P<owner>{_OWNER})-[0-9a-f]{{8}}\.tmp$", re.DOTALL)


@dataclass(frozen=True)
class Owner:
    """One process, told apart from every other one, also across reboots, containers and reused pids."""

    machine: str
    """8 hex digits of the host name and the pid namespace: within one of these a pid means something."""
    boot: str
    """8 hex digits of the kernel's boot id."""
    pid: int
    started: int
    """Start of the process in clock ticks since that boot."""

    @classmethod
    def here(cls) -> Owner:
        """The calling process."""
        pid = os.getpid()
        started = start_ticks(pid)
        return cls(machine=_machine(), boot=boot_id(), pid=pid, started=started or 0)

    def __str__(self) -> str:
        """``<machine>-<boot>-<pid>-<started>``, which `parse` reads."""
        return f"{self.machine}-{self.boot}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The process that such a text names; None for another text."""
        match = re.fullmatch(_OWNER, text)
        return None if match is None else cls(match[1], match[2], int(match[3]), int(match[4]))

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None when it ran where we cannot look."""
        if self.machine != _machine():
            return None
        return self.boot != boot_id() or start_ticks(self.pid) != self.started


def temporary_path(target: Path) -> Path:
    """A name beside ``target`` for its unfinished form, unique, and telling who writes it."""
    return target.with_name(f".{target.name}.{Owner.here()}-{secrets.token_hex(4)}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether ``path`` is a temporary file or directory that nobody will finish."""
    match = _TEMPORARY.match(path.name)
    owner = Owner.parse(match["owner"]) if match else None
    if owner is None:
        return False
    is_gone = owner.is_gone()
    if is_gone is None:
        return time.time() - _newest_change(path) > FOREIGN_AFTER_S
    return is_gone


def _newest_change(path: Path) -> float:
    """Time of the last change of ``path`` or of anything in it, in seconds since the epoch."""
    newest = path.lstat().st_mtime
    for folder, _, names in os.walk(path):
        newest = max([newest, *(os.lstat(os.path.join(folder, name)).st_mtime for name in [".", *names])])
    return newest


def start_ticks(pid: int) -> int | None:
    """Start of a living process in clock ticks since boot; None when there is none.

    Unlike a time of day, which psutil counts from the boot time that the kernel moves with the clock, it stays.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name is in parentheses and may hold spaces and parentheses itself.
    fields = stat[stat.rindex(b")") + 2 :].split()
    state, start = fields[0], fields[19]
    return None if state in (b"Z", b"X") else int(start)  # a zombie writes nothing any more


def _machine() -> str:
    namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def boot_id() -> str:
    """8 hex digits of the kernel's boot id: another one after every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:8]
