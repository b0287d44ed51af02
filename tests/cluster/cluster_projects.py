"""Projects for tests of clusters, and the way to bring them up."""

from __future__ import annotations

import json
from pathlib import Path

from shoal import config as shoal_config
from shoal.cluster import ClusterInfo, down, processes, up

CONFIG = """\
version: 1
name: {name}
target: local
targets: {{local: {{cpu: 2}}}}
serve: {{port: 0}}
"""


def write_project(folder: Path, name: str) -> Path:
    """A project folder with a cluster.yaml in which everything free is left free."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(CONFIG.format(name=name))
    return folder


def start(project: Path) -> ClusterInfo:
    """Bring the project's cluster up."""
    return up(shoal_config.load(project / "cluster.yaml"), project=project)


def write_record(info: ClusterInfo) -> None:
    """Record the cluster as ``up`` does."""
    info.record.parent.mkdir(exist_ok=True)
    info.record.write_text(json.dumps(info.to_json()))


class Started:
    """Clusters that a test starts; at its end every one is down and none of their processes is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids: set[str] = set()
        self._projects: set[Path] = set()

    def project(self, name: str) -> Path:
        project = write_project(self._folder / name, name)
        self._projects.add(project)
        return project

    def up(self, project: Path) -> ClusterInfo:
        info = start(project)
        self._ids.add(info.cluster_id)
        return info

    def close(self) -> None:
        for project in self._projects:
            down(project)
        left = {name: processes.find(name) for name in self._ids}
        assert not any(left.values()), f"left behind: {left}"
