"""Find what is wrong with a project's cluster or its machine, and say what to do about it."""

from __future__ import annotations

import shutil
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.cluster import info as cluster_info
from shoal.cluster import ports as port_plan
from shoal.cluster import processes, ray_edge
from shoal.cluster import start as starting
from shoal.cluster.info import ClusterInfo
from shoal.cluster.lifecycle import STARTING_NAME, check_installation
from shoal.errors import AccessError, ClusterError, RequestError, ShoalError
from shoal.storage import MIN_FREE_BYTES, Storage
from shoal.storage.disk import nearest_existing

SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY_BYTES = 512 * 2**20
"""Ray keeps objects there; with less it falls back to a folder on disk, many times slower."""
MIN_TMP_BYTES = 2**30
"""Ray's logs and spilled objects; Ray refuses work when the disk is 95 % full."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    subject: str
    """What was looked at, in two or three words."""
    level: Literal["ok", "warning", "error"]
    message: str
    """What was found."""
    next_step: str = ""
    """What to do about it; empty when all is well."""


def doctor(project: Path, *, serve_port: int | None = None, storage: Path | None = None) -> list[Finding]:
    """Look at everything that can be wrong; changes nothing and never raises for what it finds.

    ``serve_port`` and ``storage`` are those of cluster.yaml, for a cluster that does not run; a running one
    is asked itself.
    """
    project = project.resolve()
    findings = [_versions(), _shared_memory(), _free_space("temporary folder", Path("/tmp"), MIN_TMP_BYTES)]
    info: ClusterInfo | None = None
    try:
        info = cluster_info.read_record(cluster_info.state_dir(project) / cluster_info.RECORD_NAME)
    except (ClusterError, AccessError) as error:
        step = "shoal down" if isinstance(error, ClusterError) else "run shoal as that user"
        findings.append(Finding(subject="record", level="error", message=str(error), next_step=step))
    if info is not None:
        findings += [_running(info), *_token(info), *_listeners(info)]
    elif serve_port:
        findings.append(_serve_port(serve_port))
    if (folder := info.storage if info is not None else storage) is not None:
        findings += _storage(folder)
    return findings + list(_orphans(project))


def _versions() -> Finding:
    try:
        check_installation()
    except RequestError as error:
        return Finding(
            subject="versions", level="error", message=str(error), next_step="make, or see constraints.txt"
        )
    found = f"Ray {ray_edge.installed_ray_version()}, Python {cluster_info.python_version()}, {sys.prefix}"
    return Finding(subject="versions", level="ok", message=found)


def _shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return Finding(subject="shared memory", level="warning", message=f"{SHARED_MEMORY} is missing")
    size = shutil.disk_usage(SHARED_MEMORY).total
    message = f"{SHARED_MEMORY} has {_gib(size)}"
    if size >= MIN_SHARED_MEMORY_BYTES:
        return Finding(subject="shared memory", level="ok", message=message)
    step = f"give it {_gib(MIN_SHARED_MEMORY_BYTES)} or more (in a container: --shm-size=2g)"
    return Finding(subject="shared memory", level="warning", message=message, next_step=step)


def _free_space(subject: str, folder: Path, least: int) -> Finding:
    usage = shutil.disk_usage(nearest_existing(folder))
    message = f"{folder}: {_gib(usage.free)} of {_gib(usage.total)} free"
    if usage.free >= least:
        return Finding(subject=subject, level="ok", message=message)
    return Finding(subject=subject, level="error", message=message, next_step=f"free at least {_gib(least)}")


def _storage(folder: Path) -> list[Finding]:
    try:
        Storage(folder).probe()
    except ShoalError as error:
        step = "make it writable, or name another folder: storage in cluster.yaml"
        return [Finding(subject="storage", level="error", message=str(error), next_step=step)]
    return [_free_space("storage", folder, MIN_FREE_BYTES)]


def _running(info: ClusterInfo) -> Finding:
    if not info.is_alive():
        dead = ", ".join(name for name, ref in info.pids.items() if not ref.is_alive())
        message = (
            f"{info.name!r} is recorded as running and lost: {dead}. Its logs: {info.session_dir / 'logs'}"
        )
        return Finding(subject="cluster", level="error", message=message, next_step="shoal down && shoal up")
    if not starting.answers(info.dashboard_url, info.token_path):
        message = f"{info.name!r} runs and does not answer at {info.dashboard_url}"
        return Finding(subject="cluster", level="error", message=message, next_step="shoal down && shoal up")
    try:
        cluster_info.check_versions(info)
    except ClusterError as error:
        return Finding(
            subject="cluster", level="error", message=str(error), next_step="shoal down && shoal up"
        )
    return Finding(subject="cluster", level="ok", message=f"{info.name!r} answers at {info.dashboard_url}")


def _token(info: ClusterInfo) -> Iterable[Finding]:
    try:
        mode = stat.S_IMODE(info.token_path.stat().st_mode)
    except OSError as error:
        yield Finding(subject="token", level="error", message=str(error), next_step="shoal down && shoal up")
        return
    if mode & 0o077:
        message = f"{info.token_path} can be read by others (mode {mode:04o})"
        step = f"chmod 600 {info.token_path}; if it was ever open, shoal down && shoal up makes a new one"
        yield Finding(subject="token", level="error", message=message, next_step=step)
    else:
        yield Finding(subject="token", level="ok", message=f"{info.token_path}, mode {mode:04o}")


def _listeners(info: ClusterInfo) -> Iterable[Finding]:
    found = processes.listeners(info.cluster_id)
    exposed = [item for item in found if not item.is_loopback]
    for item in exposed:
        message = (
            f"{item.process} (pid {item.pid}) listens on {item.address}:{item.port}, beyond this machine"
        )
        yield Finding(
            subject="ports", level="warning", message=message, next_step="see docs/cluster.md, ports"
        )
    if not exposed:
        yield Finding(subject="ports", level="ok", message=f"{len(found)} listeners, all on loopback")


def _serve_port(port: int) -> Finding:
    if port_plan.is_free(port):
        return Finding(subject="serve port", level="ok", message=f"{port} is free")
    message = f"{port} is taken by {port_plan.holder(port) or 'a process of another user'}"
    step = "end it, or choose another: serve.port in cluster.yaml (0: any free)"
    return Finding(subject="serve port", level="error", message=message, next_step=step)


def _orphans(project: Path) -> Iterable[Finding]:
    """Processes of clusters whose record is gone or names another: nobody else will end them."""
    for (cluster_id, record), found in processes.claims().items():
        if _is_recorded(cluster_id, record):
            continue
        home = record.parent.parent
        message = (
            f"cluster {cluster_id[:8]} of {home} left {len(found)} processes: {processes.describe(found)}"
        )
        step = "shoal down" if home == project else f"cd {home} && shoal down"
        yield Finding(subject="orphans", level="error", message=message, next_step=step)


def _is_recorded(cluster_id: str, record: Path) -> bool:
    """Whether the project knows that cluster, running or starting."""
    try:
        info = cluster_info.read_record(record)
    except AccessError:
        return True  # another user's, whom only root sees: theirs to look after
    except ClusterError:
        return False
    return (info is not None and info.cluster_id == cluster_id) or record.with_name(STARTING_NAME).exists()


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
