"""The processes of one cluster: found by the cluster id in their environment, never by name.

Every process that a cluster starts inherits ``SHOAL_CLUSTER_ID``, also HAProxy, jobs and whatever user code
starts, and keeps it when its parent dies. So what belongs to a cluster is known after any crash, and nothing
else is ever touched.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

CLUSTER_ID = "SHOAL_CLUSTER_ID"
"""Environment variable that marks every process of a cluster with the cluster's id."""

RECORD = "SHOAL_CLUSTER"
"""Environment variable with the path of the cluster's record; clients have it too, without the id."""


@dataclass(frozen=True)
class Listener:
    """One listening TCP socket of a cluster."""

    pid: int
    process: str
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.address == "::1" or self.address.startswith(("127.", "::ffff:127."))


def cluster_id_of(process: psutil.Process) -> str | None:
    """The id of the cluster that started ``process``; None when none did, or we may not know."""
    try:
        return process.environ().get(CLUSTER_ID)
    except (psutil.Error, OSError):
        return None


def find(cluster_id: str) -> list[psutil.Process]:
    """Every live process of the cluster; a zombie has ended and does not count."""
    marked = [process for process in psutil.process_iter() if cluster_id_of(process) == cluster_id]
    found = {process.pid: process for process in marked}
    for process in marked:
        with contextlib.suppress(psutil.Error):  # a child may have emptied its environment
            found.update({child.pid: child for child in process.children(recursive=True)})
    found.pop(os.getpid(), None)
    return [process for process in found.values() if is_running(process)]


def is_running(process: psutil.Process) -> bool:
    """Whether the very process still runs; a zombie, or a later process with the same id, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def of_others(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run as another user; only root sees any."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended since
            if process.uids().real != os.getuid():
                found.append(process)
    return found


def describe(processes: Iterable[psutil.Process]) -> str:
    """Names and ids for a message, at most ten."""
    found = []
    for process in list(processes)[:10]:
        with contextlib.suppress(psutil.Error):
            found.append(f"{process.name()} ({process.pid})")
    return ", ".join(found)


def stop(cluster_id: str, *, grace_s: float, deadline_s: float) -> list[psutil.Process]:
    """End every process of the cluster: SIGTERM, then SIGKILL after ``grace_s``; returns those still there.

    Looks again after every round, since a process may start another while it ends. Safe to repeat.
    """
    began = time.monotonic()
    asked: set[int] = set()
    while True:
        alive = find(cluster_id)
        elapsed = time.monotonic() - began
        if not alive or elapsed > deadline_s:
            return alive
        for process in alive:
            # What we may not end (of another user, by way of sudo) is left, and said to be; the others are ended.
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if elapsed >= grace_s:
                    process.kill()
                elif process.pid not in asked:
                    process.terminate()
                    asked.add(process.pid)
        psutil.wait_procs(alive, timeout=0.1)


def listeners(cluster_id: str) -> list[Listener]:
    """Every listening TCP socket of the cluster's processes, ordered by port."""
    found: set[Listener] = set()
    for process in find(cluster_id):
        with contextlib.suppress(psutil.Error):
            name = process.name()
            found.update(
                Listener(process.pid, name, *connection.laddr[:2])
                for connection in process.net_connections(kind="tcp")
                if connection.status == psutil.CONN_LISTEN
            )
    return sorted(found, key=lambda listener: (listener.port, listener.pid))


def claims() -> dict[tuple[str, Path], list[psutil.Process]]:
    """Every process of any cluster that we may look at, by the cluster's id and the path of its record."""
    found: dict[tuple[str, Path], list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if CLUSTER_ID in environment and RECORD in environment and is_running(process):
                claim = (environment[CLUSTER_ID], Path(environment[RECORD]))
                found.setdefault(claim, []).append(process)
    return found
