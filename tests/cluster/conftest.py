"""Clusters for tests: always taken down, and nothing of them is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_projects import Started

from shoal.cluster import ClusterInfo, ports, ray_edge
from shoal.cluster import info as cluster_info
from shoal.cluster.info import ProcessRef


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterInfo]:
    """One cluster for a whole module; tests must leave it as they found it."""
    started = Started(tmp_path_factory.mktemp("cluster"))
    try:
        yield started.up(started.project("shared"))
    finally:
        started.close()


@pytest.fixture
def info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterInfo:
    """A record whose head processes are this test: alive."""
    me = ProcessRef.of(os.getpid())
    assert me is not None
    monkeypatch.setattr(cluster_info, "runtime_root", lambda: tmp_path / "run")
    run_dir = cluster_info.run_dir_of("0123456789abcdef")
    run_dir.mkdir(parents=True, mode=0o700)
    return ClusterInfo(
        cluster_id="0123456789abcdef",
        name="t",
        project=tmp_path,
        address="127.0.0.1:20000",
        dashboard_url="http://127.0.0.1:20001",
        serve_url="http://127.0.0.1:20011",
        serve_port=20011,
        storage=tmp_path / ".shoal",
        tracking=f"sqlite:///{tmp_path}/mlflow.db",
        token_path=run_dir / "token",
        run_dir=run_dir,
        session_dir=run_dir / "ray" / "session_1",
        ports=ports.plan(20_000, serve_port=0),
        started=1.0,
        num_cpus=2,
        num_gpus=0,
        pids={"gcs": me, "raylet": me},
        ray_version=ray_edge.installed_ray_version(),
        python_version=cluster_info.python_version(),
        config={"name": "t", "serve": {"port": 0, "replicas": "1..3"}},
    )
