"""Projects for tests of clusters, and the way to bring them up."""

from __future__ import annotations

import json
from pathlib import Path

from shoal import config as shoal_config
from shoal.cluster import ClusterInfo, up

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
    return up(shoal_config.load(project / "cluster.yaml"), project=project)


def write_record(info: ClusterInfo) -> None:
    """Record the cluster as ``up`` does."""
    info.record.parent.mkdir(exist_ok=True)
    info.record.write_text(json.dumps(info.to_json()))
