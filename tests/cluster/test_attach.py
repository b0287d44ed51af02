"""Attaching sets a process's environment, and detaching leaves it as it was; without a cluster."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
from cluster_projects import write_record

from shoal.cluster import ClusterInfo, attach, detach, ray_edge
from shoal.errors import ClusterError


class FakeRay(SimpleNamespace):
    """As much of Ray as attaching calls."""

    def __init__(self, fails: bool) -> None:
        super().__init__(fails=fails, attached=False)

    def is_initialized(self) -> bool:
        return self.attached

    def init(self, **_: object) -> None:
        if self.fails:
            raise ConnectionError("no")
        self.attached = True

    def shutdown(self) -> None:
        self.attached = False


@pytest.fixture
def make_ray(monkeypatch: pytest.MonkeyPatch):
    """Put a fake in Ray's place; the environment holds another cluster's address, and no record of ours."""

    def make(*, fails: bool = False) -> FakeRay:
        ray = FakeRay(fails)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setattr(ray_edge, "prepare_driver", lambda: None)
        return ray

    # The suite's own cluster is attached to this process: what that remembers is not ours to restore.
    monkeypatch.setattr(sys.modules["shoal.cluster.attach"], "_overwritten", {})
    monkeypatch.setenv("RAY_ADDRESS", "another:1")
    monkeypatch.delenv("SHOAL_CLUSTER", raising=False)
    return make


def test_detaching_leaves_the_environment_as_it_was(info: ClusterInfo, make_ray) -> None:
    make_ray()
    write_record(info)
    before = dict(os.environ)
    attach(info)
    assert os.environ["RAY_ADDRESS"] == info.address
    assert ClusterInfo.from_env() == info
    detach()
    assert dict(os.environ) == before
    detach()
    assert dict(os.environ) == before


def test_attaching_again_after_a_plain_shutdown_still_remembers(info: ClusterInfo, make_ray) -> None:
    ray = make_ray()
    before = dict(os.environ)
    attach(info)
    ray.shutdown()
    attach(info)
    detach()
    assert dict(os.environ) == before


def test_a_cluster_that_refuses_leaves_the_environment_as_it_was(info: ClusterInfo, make_ray) -> None:
    make_ray(fails=True)
    before = dict(os.environ)
    with pytest.raises(ClusterError, match="does not let us attach"):
        attach(info)
    assert dict(os.environ) == before
