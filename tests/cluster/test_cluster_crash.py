"""Clusters that die hard, start twice, or stand side by side: nothing is left, and nothing meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from projects import outside_environment
from shoal.cluster import ClusterInfo, doctor, down, environment, find, lifecycle, processes

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent
APP = """\
import os
from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Who:
    async def __call__(self, request):
        return os.environ["SHOAL_CLUSTER_ID"]


app = Who.bind()
"""
UP = """
import sys
from pathlib import Path
from cluster_projects import start
print(start(Path(sys.argv[1])).cluster_id)
"""


def deploy(info: ClusterInfo) -> None:
    (info.project / "who_app.py").write_text(APP)
    (info.project / "who.yaml").write_text(
        "applications: [{name: w, route_prefix: /, import_path: 'who_app:app'}]\n"
    )
    command = [str(BIN / "serve"), "deploy", str(info.project / "who.yaml")]
    subprocess.run(
        command, env={**os.environ, **environment(info)}, check=True, capture_output=True, timeout=120
    )


def answer(info: ClusterInfo) -> str | None:
    with suppress(OSError), urllib.request.urlopen(info.serve_url, timeout=2) as response:
        return str(response.read().decode())
    return None


ATTACH = """
import sys
from pathlib import Path
from shoal.cluster import attach
from shoal.cluster.info import read_record
attach(read_record(Path(sys.argv[1])))
"""


def spawn_up(project: Path) -> subprocess.Popen[str]:
    paths = [str(Path(__file__).parent), str(Path(lifecycle.__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", UP, str(project)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_clusters_do_not_meet(clusters, wait_until: Callable[..., None]) -> None:
    first, second = (clusters.up(clusters.project(name)) for name in ("first", "second"))
    for info in (first, second):
        deploy(info)
    for info in (first, second):
        wait_until(
            lambda info=info: answer(info) == info.cluster_id, what="its own app answers", timeout_s=120
        )
    own = {
        info.cluster_id: {item.port for item in processes.listeners(info.cluster_id)}
        for info in (first, second)
    }
    assert not own[first.cluster_id] & own[second.cluster_id]
    down(first.project)
    assert processes.find(first.cluster_id) == []
    assert answer(second) == second.cluster_id
    assert second.is_alive()


def test_a_cluster_that_died_hard_is_cleaned_and_comes_back(
    clusters, wait_until: Callable[..., None]
) -> None:
    project = clusters.project("crash")
    info = clusters.up(project)
    deploy(info)
    wait_until(lambda: answer(info) == info.cluster_id, what="the app answers", timeout_s=120)
    for ref in info.pids.values():
        os.kill(ref.pid, signal.SIGKILL)
    wait_until(lambda: not info.is_alive(), what="GCS and raylet are gone")
    assert find(project) is None
    refused = subprocess.run(  # in a process of its own: this one is attached to the suite's cluster
        [sys.executable, "-c", ATTACH, str(info.record)],
        env=outside_environment(PYTHONPATH=str(Path(lifecycle.__file__).parents[2])),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "no longer runs. Start it: shoal up" in refused.stderr
    assert "shoal down" in {f.next_step.split(" && ")[0] for f in doctor(project) if f.subject == "cluster"}
    assert processes.find(info.cluster_id), "nothing outlived the crash: this test shows nothing"
    assert down(project)
    assert processes.find(info.cluster_id) == []
    assert not info.run_dir.exists()
    again = clusters.up(project)
    assert again.cluster_id != info.cluster_id
    deploy(again)
    wait_until(lambda: answer(again) == again.cluster_id, what="the app answers again", timeout_s=120)


def test_up_cleans_after_a_crash_by_itself(clusters) -> None:
    project = clusters.project("again")
    info = clusters.up(project)
    os.kill(info.pids["gcs"].pid, signal.SIGKILL)
    again = clusters.up(project)
    assert again.cluster_id != info.cluster_id
    assert processes.find(info.cluster_id) == []


def test_two_starts_at_once_give_one_cluster(clusters) -> None:
    project = clusters.project("twice")
    starts = [spawn_up(project) for _ in range(2)]
    ids = {process.communicate(timeout=300)[0].strip() for process in starts}
    info = find(project)
    assert info is not None
    assert ids == {info.cluster_id}
    assert {claim for claim, record in processes.claims() if record == info.record} == ids


def test_a_start_killed_half_way_is_cleaned_by_the_next(clusters, wait_until: Callable[..., None]) -> None:
    project = clusters.project("half")
    starting = spawn_up(project)
    record = project / ".shoal" / "cluster.json"

    def raylet_or_gcs() -> list[str]:
        return [
            name
            for (name, claimed), found in processes.claims().items()
            if claimed == record and len(found) > 2
        ]

    wait_until(raylet_or_gcs, what="the first processes of the cluster run", timeout_s=120)
    (half,) = raylet_or_gcs()
    starting.kill()
    starting.wait()
    assert not record.exists()
    info = clusters.up(project)
    assert info.cluster_id != half
    assert processes.find(half) == []
    assert psutil.pid_exists(info.pids["raylet"].pid)
