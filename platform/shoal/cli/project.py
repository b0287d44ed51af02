"""Which project, cluster and storage a command is about.

Inside a cluster, and in a shell that has its ``shoal env``, it is that cluster; else the one of the nearest
``cluster.yaml``. What is on storage can be looked at without a cluster.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import AccessError, ClusterError, RequestError

if TYPE_CHECKING:
    from shoal.api import Cluster
    from shoal.cluster import ClusterInfo
    from shoal.config import ClusterConfig
    from shoal.recipe import Recipe
    from shoal.storage import Storage


def project_here() -> Path:
    """The folder of the nearest ``cluster.yaml``.

    Raises:
        ConfigError: there is none here or above.
    """
    from shoal.config import find

    return find().parent


def running() -> ClusterInfo | None:
    """The cluster that is meant, if it runs.

    Raises:
        ConfigError: there is no ``cluster.yaml``, and the environment names no cluster.
        ClusterError: the environment names a cluster that is gone.
    """
    from shoal.cluster import find, this_cluster

    info = this_cluster()
    if info is None:
        return find(project_here())
    return info if info.is_alive() else None


def require_running() -> ClusterInfo:
    """The running cluster.

    Raises:
        RequestError: none runs. Starting one is ``shoal up``'s: it stays, a command's would not.
    """
    info = running()
    if info is None:
        raise RequestError("no cluster of this project runs; start it: shoal up")
    return info


def connect() -> Cluster:
    """The running cluster, with this process attached to it; takes about a second.

    Raises:
        RequestError: none runs.
        ConfigError: ``cluster.yaml`` means another storage or tracking than the running cluster's.
        ClusterError: it does not answer.
    """
    require_running()
    from shoal import api

    return api.connect()


def settings() -> tuple[ClusterConfig, Storage]:
    """The config and the storage that a new run would get: the running cluster's, else the file's."""
    from shoal.config import ClusterConfig
    from shoal.storage import Storage

    info = running()
    if info is not None:
        return ClusterConfig.from_dict(info.config), Storage(info.storage)
    return _written()


def _written() -> tuple[ClusterConfig, Storage]:
    from shoal.config import load
    from shoal.storage import Storage

    config = load()
    return config, Storage(config.storage_path(project_here()))


def storage() -> Storage:
    """Where runs, sweeps and models are, with or without a cluster."""
    from shoal.storage import Storage

    try:
        info = running()
    except (ClusterError, AccessError):  # a record that cannot be read must not hide the runs
        info = None
    return Storage(info.storage) if info is not None else _written()[1]


def load_recipe(ref: str) -> type[Recipe]:
    """The recipe that ``jobs.digits`` or ``jobs.digits:Digits`` names, looked for in the project first.

    Raises:
        NotFoundError, RecipeError: as `shoal.recipe.load_recipe`.
    """
    from shoal.cluster import this_cluster
    from shoal.recipe import load_recipe

    info = this_cluster()
    folder = str(info.project if info is not None else project_here())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return load_recipe(ref)
