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

_TEMPORARY = re.compile(r"^\..*\.([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.tmp$", re.DOTALL)


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

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None when it ran where we cannot look."""
        if self.machine != _machine():
            return None
        return self.boot != boot_id() or start_ticks(self.pid) != self.started


def temporary_path(target: Path) -> Path:
    """A name beside ``target`` for its unfinished form, unique, and telling who writes it."""
    owner = Owner.here()
    tag = f"{owner.machine}-{owner.boot}-{owner.pid}-{owner.started}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name}.{tag}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether ``path`` is a temporary file or directory that nobody will finish."""
    match = _TEMPORARY.match(path.name)
    if match is None:
        return False
    machine, boot, pid, started = match.groups()
    is_gone = Owner(machine, boot, int(pid), int(started)).is_gone()
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
