"""How a process comes by a cluster: attach to the one that runs, or start one."""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shoal import cluster as clusters
from shoal.api.cluster import Cluster
from shoal.cluster.attach import attach as attach_driver
from shoal.cluster.attach import detach
from shoal.cluster.info import read_record
from shoal.cluster.lifecycle import plan_start, up_plan
from shoal.config import ClusterConfig, find, load
from shoal.errors import ConfigError, Problem, RequestError
from shoal.tracking import ensure_tracker

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

logger = logging.getLogger(__name__)

_DOWN = "import sys; from pathlib import Path; from shoal.cluster import down; down(Path(sys.argv[1]))"
_DOWN_TIMEOUT_S = 60.0
"""How long a process waits at its end for its cluster's; `shoal.cluster.down` has deadlines of its own."""


def connect(project: Path | str | None = None) -> Cluster:
    """Attach to the project's running cluster; on target ``local`` start one if none runs.

    ``project`` is the folder that holds ``cluster.yaml``; None looks in this folder and those above it. Inside a
    job on a cluster it is that cluster, whatever the folder. A cluster started here ends with this process; one
    that ``shoal up`` started stays. Blocks for about 10 s to start one, less than 1 s to attach. Repeating it is
    cheap.

    Raises:
        ConfigError: there is no ``cluster.yaml``, or it has problems; or its storage or tracking is not what the
            running cluster was started with.
        RequestError: none runs, and the file's target is not ``local``.
        ClusterError: the cluster does not start or answer.
    """
    info = clusters.this_cluster()
    if info is None or project is not None:
        config = load(Path(project) if project is not None else None)
        folder = _project_folder(project)
        info = clusters.find(folder) or _start(config, folder)
        _check_same_places(config, info)
    return attach(info)


def attach(info: ClusterInfo) -> Cluster:
    """A handle on a running cluster; makes this process one of its drivers."""
    if str(info.project) not in sys.path:
        sys.path.insert(0, str(info.project))
    attach_driver(info)
    ensure_tracker(info)
    return Cluster(info)


def _project_folder(project: Path | str | None) -> Path:
    if project is not None:
        path = Path(project)
        return (path if path.is_dir() else path.parent).resolve()
    return find().parent.resolve()


def _start(config: ClusterConfig, folder: Path) -> ClusterInfo:
    if config.target != "local":
        raise RequestError(
            f"no cluster of {folder} is running, and connect() starts one only on target 'local' "
            f"(the file says {config.target!r}). Start it: shoal up"
        )
    return bring_up(config, folder, say=logger.info, ends_with_us=True)


def bring_up(
    config: ClusterConfig, project: Path, *, say: Callable[[str], None], ends_with_us: bool = False
) -> ClusterInfo:
    """Start the cluster, with what the first run and the first model will want; or find it running. Blocks.

    ``ends_with_us``: a cluster that this call starts ends with this process; one found running stays.

    Raises:
        ClusterError, RequestError: as `shoal.cluster.up`.
    """
    plan, notes = plan_start(config, project=project)
    info = up_plan(plan, say=say, notes=notes)
    if info.cluster_id == plan.cluster_id:  # else another process started it, before or meanwhile
        if ends_with_us:
            atexit.register(_end, info)
        attach_driver(info)
        ensure_tracker(info)
    return info


def _end(info: ClusterInfo) -> None:
    """End the cluster, unless the project has another by now: one that someone's `shoal up` started."""
    detach()
    recorded = read_record(info.record)
    if recorded is not None and recorded.cluster_id == info.cluster_id:
        _down_apart(info.project)


def _down_apart(project: Path) -> None:
    """End the project's cluster from a process that goes on when this one is killed, and wait for it.

    Jupyter asks a kernel to end, sends SIGTERM 2.5 s later and SIGKILL after 5 s (its ``shutdown_wait_time``): too
    soon for a cluster, half of which was left running.
    """
    library = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (library, os.environ.get("PYTHONPATH"))))
    ender = subprocess.Popen(
        [sys.executable, "-c", _DOWN, str(project)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        ender.wait(_DOWN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        logger.warning("the cluster of %s did not end within %g s: shoal down", project, _DOWN_TIMEOUT_S)


def _check_same_places(config: ClusterConfig, info: ClusterInfo) -> None:
    """Storage and tracking belong to the cluster: a client that means others must not write there unnoticed."""
    wanted = {
        "storage": str(config.storage_path(info.project)),
        "tracking": config.tracking_uri(info.project),
    }
    running = {"storage": str(info.storage), "tracking": info.tracking}
    problems = [
        Problem(
            path,
            f"the running cluster uses {running[path]}; `shoal down && shoal up` applies the file",
            value,
        )
        for path, value in wanted.items()
        if value != running[path]
    ]
    if problems:
        raise ConfigError(problems)
