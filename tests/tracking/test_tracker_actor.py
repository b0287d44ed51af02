"""The tracker as the cluster runs it."""

from __future__ import annotations

import os
import signal

import pytest

from shoal.errors import NotFoundError
from shoal.storage import Storage, commit
from shoal.tracking import RunRecord, ensure_tracker, open_registry

pytestmark = pytest.mark.cluster


def write(directory, version):
    commit(directory, lambda folder: (folder / "weights").write_text(str(version)) and None, meta={})


def test_one_tracker_delivers_registers_and_comes_back_when_killed(cluster):
    import ray

    tracker = ensure_tracker(cluster)
    record = RunRecord(Storage(cluster.storage), "tracked-1")
    record.claim_identity({"recipe": "jobs.tracked:Tracked", "fields": {}})
    record.append("start", step=0, target_steps=1)
    record.append("metrics", step=1, values={"loss": 1.0})
    record.append("end", step=1, state="finished", error="")
    status = tracker.flush()
    assert (status.state, status.behind_runs) == ("ok", 0), status

    registry = open_registry(cluster)
    assert registry.register("tracked", write, run="tracked-1", alias="champion").version == 1
    with pytest.raises(NotFoundError, match="no version '2'") as caught:
        registry.resolve("tracked@2")
    assert "Traceback" not in str(caught.value)

    pid = ray.get(ensure_tracker(cluster)._handle.pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert registry.register("tracked", write, alias="champion").version == 2
    assert registry.resolve("tracked@champion").version == 2
    assert ray.get(tracker._handle.pid.remote()) != pid
    assert tracker.flush().state == "ok"
