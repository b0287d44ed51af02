"""A job as a guest: ``ray job submit`` on a Ray cluster that shoal did not start, and so has no record of.

What a record would say is in the ``cluster.yaml`` that came with the job, and in what Ray tells its jobs.
Training and tuning need no more; serving does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shoal.cluster import ray_edge
from shoal.cluster.info import ClusterInfo, python_version
from shoal.config import ClusterConfig, load
from shoal.config.load import find as find_file
from shoal.errors import ConfigError, Problem

_NO_FILE = Path(os.devnull)
_SQLITE = "sqlite:///"


def this_cluster() -> ClusterInfo | None:
    """The cluster that this process is part of or attached to, or that hosts its job; None when there is none.

    Raises:
        ClusterError: the environment names a record that cannot be read.
        ConfigError: it is a guest's job, and its ``cluster.yaml`` is missing, has problems, or would keep runs in
            the job's throw-away folder.
    """
    info = ClusterInfo.from_env()
    if info is not None or not ray_edge.is_submitted_job():
        return info
    file = find_file()
    return _host_of(file.parent.resolve(), load(file))


def _host_of(folder: Path, config: ClusterConfig) -> ClusterInfo:
    _refuse_throw_away(folder, config)
    return ClusterInfo(
        cluster_id="",
        name=config.name,
        project=folder,
        address=os.environ[ray_edge.ADDRESS],
        dashboard_url="",
        serve_url="",
        serve_port=0,
        storage=config.storage_path(folder),
        tracking=config.tracking_uri(folder),
        token_path=_NO_FILE,
        run_dir=_NO_FILE,
        session_dir=_NO_FILE,
        ports={},
        started=0.0,
        num_cpus=0,
        # How many are free is Ray's to say; here it matters only whether a worker asks for one.
        num_gpus=max((pool.max_gpus for pool in config.pools.values()), default=0),
        pids={},
        ray_version=ray_edge.installed_ray_version(),
        python_version=python_version(),
        config=config.as_dict(),
    )


def _refuse_throw_away(folder: Path, config: ClusterConfig) -> None:
    folder = folder.resolve()
    places = {"storage": config.storage_path(folder)}
    tracking = config.tracking_uri(folder)
    if tracking.startswith(_SQLITE):  # else a server, which is nobody's folder
        places["tracking"] = Path(tracking.removeprefix(_SQLITE))
    problems = [
        Problem(
            path,
            f"inside this job's folder ({folder}), which Ray throws away. The cluster was not started by shoal, so "
            "the file must name a folder that every node sees, such as `storage: /mnt/runs`; for this job "
            f'alone: --runtime-env-json \'{{"env_vars": {{"SHOAL_SET_{path.upper()}": "/mnt/runs"}}}}\'',
            value=getattr(config, path),
        )
        for path, place in places.items()
        if getattr(config, path) is not None and place.resolve().is_relative_to(folder)
    ]
    if problems:
        raise ConfigError(problems, source="cluster.yaml")


def runtime_environment(info: ClusterInfo) -> dict[str, Any] | None:
    """What workers need on the host of a guest: shoal, where it came with the job. None on a cluster of shoal's."""
    if not info.is_foreign:
        return None
    library = Path(__file__).resolve().parents[1]
    came_along = library.is_relative_to(info.project)
    return {"env_vars": ray_edge.GUEST_ENVIRONMENT, **({"py_modules": [str(library)]} if came_along else {})}
