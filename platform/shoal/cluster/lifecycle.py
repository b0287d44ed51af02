"""Bring a project's cluster up and take it down; one at a time, whatever was left by a crash."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.cluster import info as cluster_info
from shoal.cluster import ports as port_plan
from shoal.cluster import processes, ray_edge
from shoal.cluster import start as starting
from shoal.cluster.info import ClusterInfo, state_dir
from shoal.cluster.start import StartPlan
from shoal.errors import (
    AccessError,
    ClusterError,
    CorruptError,
    DeadlineExceeded,
    NotFoundError,
    RequestError,
    StorageError,
)
from shoal.storage import FileLock, Storage, read_json, write_json
from shoal.storage.disk import storage_error

if TYPE_CHECKING:
    from shoal.config import ClusterConfig

STARTING_NAME = "cluster.starting.json"
"""Written before the first process, removed when the cluster is recorded: names what a dead `up` left."""
_LOCK_TIMEOUT_S = starting.START_DEADLINE_S + 60.0
"""Longer than a start: whoever waits gets the cluster that the other one starts."""

_ANSWER_TIMEOUT_S = 15.0
"""How long a running cluster may take to answer."""

LOCAL_NAMES = {"localhost": ray_edge.LOOPBACK}
"""Names with one address for every program; resolving them differs between HAProxy, Ray and Python."""

_log = logging.getLogger(__name__)


def up(config: ClusterConfig, *, project: Path, say: Callable[[str], None] = _log.info) -> ClusterInfo:
    """Return the project's running cluster, starting it when there is none; blocks about 10 s then.

    Safe to repeat, and at once from several processes: all get the same cluster. What an interrupted start
    or a crash left is removed first. ``say`` is told what happens, in sentences for a person.

    Raises:
        AccessError: the project's cluster is another user's, also for root; nothing was changed.
        RequestError: the cluster runs with another configuration, a port is taken, a version does not fit.
        ClusterError: it does not start or answer.
        StorageError: storage is not writable, or full.
    """
    plan, notes = plan_start(config, project=project)
    return up_plan(plan, say=say, notes=notes)


def up_plan(
    plan: StartPlan, *, say: Callable[[str], None] = _log.info, notes: tuple[str, ...] = ()
) -> ClusterInfo:
    """As ``up``, from a plan already made; this call started the cluster if it has the plan's ``cluster_id``."""
    check_installation()
    _check_own(plan.project)
    with _lock(plan.project):
        running = _recover(plan.project, say)
        if running is not None:
            _check_same_config(running, plan)
            say(f"cluster {running.name!r} is already up: {running.dashboard_url}")
            return running
        for note in notes:
            say(f"note: {note}")
        Storage(plan.storage).check()
        _check_serve_port(plan)
        marker = state_dir(plan.project) / STARTING_NAME
        write_json(marker, {"cluster_id": plan.cluster_id, "project": str(plan.project)})
        root = cluster_info.runtime_root()
        try:
            starting.private_dir(root)
            # One start at a time per user: the ports of one are written down before the next chooses.
            with FileLock(root / "lock", timeout_s=_LOCK_TIMEOUT_S):
                info = starting.start(plan, say)
        except OSError as error:
            raise ClusterError(
                f"cluster {plan.name!r} cannot be started in {root}: {error}. Next: shoal doctor"
            ) from error
        _record(info)
        marker.unlink()
        say(f"cluster {info.name!r} is up: {info.dashboard_url}")
        return info


def down(project: Path, *, say: Callable[[str], None] = _log.info) -> bool:
    """Stop the project's cluster with everything it started; False when there was nothing to stop.

    Returns once every process is gone. Safe to repeat; also cleans what a crash or a killed ``up`` left.

    Raises:
        AccessError: the cluster is another user's, also for root; nothing was changed.
        RequestError: called from inside the cluster, which would end the caller half way.
        ClusterError: a process does not end.
    """
    project = project.resolve()
    if not state_dir(project).is_dir():
        return False
    _check_own(project)
    with _lock(project):
        found = _claims(project, say)
        for cluster_id in found:
            if os.environ.get(processes.CLUSTER_ID) == cluster_id:
                raise RequestError(
                    "`shoal down` was called from inside the cluster it would stop; call it from a shell"
                )
            say(f"stopping cluster {cluster_id[:8]}")
            starting.abandon(cluster_id)
        _forget(project)
        return bool(found)


def plan_start(config: ClusterConfig, *, project: Path) -> tuple[StartPlan, tuple[str, ...]]:
    """What ``up`` would start, and what it leaves out of the file, as sentences; starts nothing.

    Raises:
        RequestError: the target is not ``local``, the only one that can be started from here.
    """
    from shoal.config import Machine, plan_local

    if config.target != "local":
        raise RequestError(f"target {config.target!r} cannot be started by `shoal up`; use --target local")
    project = project.resolve()
    local = plan_local(config, Machine.here())
    plan = StartPlan(
        cluster_id=secrets.token_hex(8),
        name=config.name,
        project=project,
        storage=config.storage_path(project),
        tracking=config.tracking_uri(project),
        serve_host=LOCAL_NAMES.get(config.serve.host, config.serve.host),
        serve_port=config.serve.port,
        num_cpus=local.num_cpus,
        num_gpus=local.num_gpus,
        config=config.as_dict(),
    )
    return plan, local.notes


def check_installation() -> None:
    """Check Ray and Python against what shoal was made for.

    Raises:
        RequestError: either is another version.
    """
    ray, python = ray_edge.installed_ray_version(), sys.version_info[:2]
    if ray != ray_edge.RAY_VERSION:
        raise RequestError(
            f"shoal needs Ray {ray_edge.RAY_VERSION}, found {ray}: pip install 'ray[serve,train,tune]=="
            f"{ray_edge.RAY_VERSION}'"
        )
    if python != ray_edge.PYTHON_VERSION:
        wanted = ".".join(map(str, ray_edge.PYTHON_VERSION))
        raise RequestError(f"shoal needs Python {wanted}, found {cluster_info.python_version()}")


def _recover(project: Path, say: Callable[[str], None]) -> ClusterInfo | None:
    """The healthy cluster of the project, or None after whatever was left of an earlier one is gone.

    Raises:
        ClusterError: it runs and does not answer.
    """
    info = None
    with suppress(ClusterError):  # a record that cannot be read is cleaned like a dead one
        info = cluster_info.find(project)
    if info is not None:
        if starting.answers_within(info, timeout_s=_ANSWER_TIMEOUT_S):
            return info
        if info.is_alive():  # a machine that is busy, say: nobody asked to end what runs on it
            raise ClusterError(
                f"cluster {info.name!r} runs and does not answer at {info.dashboard_url} within "
                f"{_ANSWER_TIMEOUT_S:.0f} s. Try again when the machine is less busy; `shoal doctor` says "
                f"more; `shoal down` ends it, with every run on it."
            )
    for cluster_id in _claims(project, say):
        say(f"cleaning up cluster {cluster_id[:8]}, which no longer runs")
        starting.abandon(cluster_id)
    _forget(project)
    return None


def _check_own(project: Path) -> None:
    for name in (cluster_info.RECORD_NAME, STARTING_NAME):
        cluster_info.check_own(state_dir(project) / name)


def _claims(project: Path, say: Callable[[str], None]) -> list[str]:
    """The id of every cluster of this project: by its records, and by processes that name it.

    Raises:
        AccessError: one runs as another user.
    """
    claims: dict[str, None] = {}  # in order, each once
    for name in (cluster_info.RECORD_NAME, STARTING_NAME):
        path = state_dir(project) / name
        try:
            record = read_json(path)
            cluster_id, home = _checked_id(record["cluster_id"]), Path(record["project"])
        except NotFoundError:
            continue
        except (CorruptError, StorageError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s cannot be read (%s); its cluster is found by its processes", path, error)
            continue
        if cluster_info.is_folder(project, home):
            claims[cluster_id] = None
        else:
            say(f"{path} came with a copy of {home}, whose cluster is left alone")
    record_path = state_dir(project) / cluster_info.RECORD_NAME
    for (cluster_id, claimed), found in processes.claims().items():
        if claimed != record_path:
            continue
        if others := processes.of_others(found):
            raise AccessError(
                f"a cluster of {project} runs as another user: {processes.describe(others)}. It was left alone; "
                "run shoal as that user"
            )
        with suppress(ValueError):  # anybody may set the variable; what is no id names no cluster
            claims[_checked_id(cluster_id)] = None
    return list(claims)


def _checked_id(found: str) -> str:
    cluster_info.run_dir_of(found)
    return found


def _forget(project: Path) -> None:
    for name in (cluster_info.RECORD_NAME, STARTING_NAME):
        (state_dir(project) / name).unlink(missing_ok=True)


def _record(info: ClusterInfo) -> None:
    write_json(info.record, info.to_json())


def _lock(project: Path) -> FileLock:
    folder = state_dir(project)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise storage_error("make the folder", folder, error) from error
    lock = FileLock(folder / "cluster.lock")
    try:
        lock.acquire(timeout_s=_LOCK_TIMEOUT_S)
    except DeadlineExceeded as error:
        raise ClusterError(
            f"another `shoal up` or `shoal down` of {project} does not end ({error}). End that process, "
            f"and try again."
        ) from error
    return lock


def _check_same_config(running: ClusterInfo, plan: StartPlan) -> None:
    differing = cluster_info.differences(running, plan.config)
    if differing:
        raise RequestError(
            f"cluster {running.name!r} runs with another configuration than cluster.yaml now says:\n  "
            + "\n  ".join(differing)
            + "\nTo apply the file: shoal down && shoal up"
        )
    cluster_info.check_versions(running)


def _check_serve_port(plan: StartPlan) -> None:
    port = plan.serve_port
    if port and not port_plan.is_free(port):
        by = port_plan.holder(port) or "a process of another user"
        raise RequestError(
            f"serve.port {port} is taken by {by}. End it, or choose another: serve.port in cluster.yaml "
            f"(0: any free)"
        )
