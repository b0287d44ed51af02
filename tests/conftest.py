"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from projects import write_project

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anything imports ray

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterInfo]:
    """One local cluster for the whole session, attached to this process; nothing of it is left afterwards."""
    from shoal.cluster import down, processes, up
    from shoal.cluster.attach import attach, detach
    from shoal.config import load

    project = write_project(tmp_path_factory.mktemp("project"))
    info = up(load(project), project=project)
    try:
        attach(info)
        yield info
    finally:
        detach()
        down(project)
        left = processes.find(info.cluster_id)
        assert not left, f"the cluster left processes behind: {processes.describe(left)}"
