"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "platform"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anything imports ray

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

PROJECT_FILES = ("jobs", "serve_apps")


def write_project(folder: Path, *, name: str = "test", cpu: int = 4, extra: str = "") -> Path:
    """A project on this machine in ``folder``, with this repository's jobs and apps; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(
        f"version: 1\nname: {name}\nserve: {{port: 0}}\ntargets: {{local: {{cpu: {cpu}}}}}\n{extra}"
    )
    for part in PROJECT_FILES:
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    return folder


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
