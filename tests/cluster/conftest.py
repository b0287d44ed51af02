"""Clusters for tests: always taken down, and nothing of them is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_projects import start, write_project

from shoal.cluster import ClusterInfo, down, processes


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


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Started]:
    started = Started(tmp_path)
    yield started
    started.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterInfo]:
    """One cluster for a whole module; tests must leave it as they found it."""
    started = Started(tmp_path_factory.mktemp("cluster"))
    try:
        yield started.up(started.project("shared"))
    finally:
        started.close()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    def wait(condition: Callable[[], object], *, what: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < deadline, f"still not after {timeout_s} s: {what}"
            pause.wait(0.05)

    return wait
