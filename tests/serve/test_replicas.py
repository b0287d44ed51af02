"""Several replicas under load: one more where it is needed, and one that is killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from test_endpoint import write_version_to

from shoal.cluster import ClusterInfo
from shoal.serve import App, deploy
from shoal.serve.rest import read_serve
from shoal.tracking import open_registry
from waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_CALLERS = 80
"""More than two batches of 32: one replica is not enough for them, two are."""
ENOUGH_S = 40.0
"""For a replica to start on a machine that does ten other things; alone it takes 6 s (2 cores, 2026-11-24)."""
ASK_EVERY_S = 0.1
"""Between looks at the replicas: Serve's controller, which starts them, answers those."""
SLOW_APP = """
import threading
from serve_apps.digits import Digits
from shoal.serve import app as make_app

class Slow(Digits):
    num_cpus = 0.5
    def answer(self, outputs):
        threading.Event().wait(0.1)  # what a larger model takes: callers wait for the replica, not for the CPU
        return super().answer(outputs)

app = make_app(Slow)
"""
BODY = json.dumps({"pixels": [[0, 0, 0, 8, 14, 0, 0, 0]] * 8}).encode()


class Load:
    """Callers who ask one after the other until the load is stopped; each has one request in flight."""

    def __init__(self, url: str, num_callers: int) -> None:
        self.answered: list[float] = []
        """When answers came; `failed` has when requests failed and why."""
        self.failed: list[tuple[float, str]] = []
        self._url = urlsplit(f"{url}/predict")
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(num_callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)

    def _call(self) -> None:
        connection = self._connect()
        while not self._is_over.is_set():
            try:
                connection.request("POST", self._url.path, BODY, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                if response.status != 200:
                    raise http.client.HTTPException(f"{response.status} {text[:100]!r}")
                self.answered.append(time.monotonic())
            except (OSError, http.client.HTTPException) as error:
                self.failed.append((time.monotonic(), repr(error)))
                connection.close()
                connection = self._connect()
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        assert self._url.hostname is not None
        return http.client.HTTPConnection(self._url.hostname, self._url.port, timeout=60)


def live_pids(cluster: ClusterInfo) -> set[int]:
    deployments = read_serve(cluster)["applications"]["slow"]["deployments"].values()
    return {
        replica["pid"]
        for deployment in deployments
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


@pytest.fixture(scope="module")
def slow(cluster: ClusterInfo) -> Iterator[App]:
    (cluster.project / "slow_app.py").write_text(SLOW_APP)

    def write(path: Path, version: int) -> None:
        write_version_to(path, "slow", version, always=3)

    version = open_registry(cluster).register("slow", write)
    app = deploy(cluster, "slow_app:app", model=str(version), name="slow")
    yield app
    app.delete()


def wait_for_second(slow: App, cluster: ClusterInfo, load: Load) -> float:
    """Seconds until two replicas live."""
    return wait_until(
        lambda: len(live_pids(cluster)) >= 2,
        lambda: (slow.status(), load.failed[:5]),
        timeout_s=ENOUGH_S,
        every_s=ASK_EVERY_S,
    )


def test_load_that_needs_more_brings_a_second_replica_within_seconds(slow: App, cluster: ClusterInfo) -> None:
    assert len(live_pids(cluster)) == 1
    with Load(slow.url, NUM_CALLERS) as load:
        seconds = wait_for_second(slow, cluster, load)
    print(f"a second replica after {seconds:.1f} s, {len(load.answered)} answers")
    assert not load.failed


def test_a_killed_replica_fails_what_was_in_flight_and_nothing_else(slow: App, cluster: ClusterInfo) -> None:
    with Load(slow.url, NUM_CALLERS) as load:
        wait_for_second(slow, cluster, load)
        before = live_pids(cluster)
        victim = min(before)
        num_answered = len(load.answered)
        wait_until(lambda: len(load.answered) > num_answered, lambda: load.failed[:5], timeout_s=30)
        assert not load.failed
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        back_s = wait_until(
            lambda: victim not in (now := live_pids(cluster)) and len(now) >= len(before),
            lambda: (slow.status(), load.failed[:5]),
            timeout_s=ENOUGH_S,
            every_s=ASK_EVERY_S,
        )
        num_answered = len(load.answered)
        wait_until(
            lambda: len(load.answered) > num_answered + NUM_CALLERS, lambda: load.failed[:5], timeout_s=30
        )
    after = sorted(t for t in load.answered if t > killed)
    gap_s = max(later - earlier for earlier, later in zip([killed, *after], after, strict=False))
    last_s = max((t for t, _ in load.failed), default=killed) - killed
    print(
        f"replicas {len(before)}, failed {len(load.failed)} of {len(load.answered)}, the last after {last_s:.1f} s; "
        f"full strength after {back_s:.1f} s; longest silence {gap_s:.2f} s; {load.failed[:4]}"
    )
    assert 0 < len(load.failed) < NUM_CALLERS, (
        "each caller had one request in flight, only some of them there"
    )
    assert last_s < 4
    assert gap_s < 4, "the others go on answering (with none left it was 6 s)"
