"""Clusters that start twice, die hard, or stand side by side: nothing is left, and nothing meets.

All in one project: a test takes the cluster that the one before left running, or starts one (`up` does both).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cluster_projects import Started

from projects import outside_environment
from shoal.cluster import ClusterInfo, doctor, down, environment, find, lifecycle, processes
from waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]

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


def deploy(info: ClusterInfo, apps: str = "{name: w, route_prefix: /, import_path: 'who_app:app'}") -> None:
    (info.project / "who_app.py").write_text(APP)
    (info.project / "who.yaml").write_text(f"applications: [{apps}]\n")
    command = [str(BIN / "serve"), "deploy", str(info.project / "who.yaml")]
    subprocess.run(
        command, env={**os.environ, **environment(info)}, check=True, capture_output=True, timeout=240
    )


def answer(info: ClusterInfo) -> str | None:
    with suppress(OSError), urllib.request.urlopen(info.serve_url, timeout=10) as response:
        return str(response.read().decode())
    return None


def wait_for_own_answer(info: ClusterInfo) -> None:
    """Return once the cluster's own app answers; deploys it unless a test before did."""
    if answer(info) is None:
        deploy(info)
    wait_until(lambda: answer(info) == info.cluster_id, "the cluster's own app answers")


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


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(tmp_path_factory.mktemp("crash"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def project(clusters: Started) -> Path:
    return clusters.project("crash")


def test_two_starts_at_once_give_one_cluster_and_end_what_a_killed_start_left(
    clusters: Started, project: Path
) -> None:
    down(project)
    starting = spawn_up(project)
    record = project / ".shoal" / "cluster.json"

    def raylet_or_gcs() -> list[str]:
        return [
            name
            for (name, claimed), found in processes.claims().items()
            if claimed == record and len(found) > 2
        ]

    wait_until(raylet_or_gcs, "the first processes of the cluster run")
    (half,) = raylet_or_gcs()
    starting.kill()
    starting.communicate()
    assert not record.exists()

    starts = [spawn_up(project) for _ in range(2)]
    ids = {process.communicate(timeout=300)[0].strip() for process in starts}
    info = clusters.up(project)
    assert ids == {info.cluster_id}
    assert info.cluster_id != half
    assert {claim for claim, claimed in processes.claims() if claimed == record} == ids
    assert processes.find(half) == []
    assert psutil.pid_exists(info.pids["raylet"].pid)


def test_up_cleans_after_a_crash_by_itself(clusters: Started, project: Path) -> None:
    info = clusters.up(project)
    os.kill(info.pids["gcs"].pid, signal.SIGKILL)
    again = clusters.up(project)  # at once: what was killed may still look alive
    assert again.cluster_id != info.cluster_id
    assert processes.find(info.cluster_id) == []


def test_a_cluster_that_died_hard_is_cleaned_and_comes_back(clusters: Started, project: Path) -> None:
    info = clusters.up(project)
    wait_for_own_answer(info)
    for ref in info.pids.values():
        os.kill(ref.pid, signal.SIGKILL)
    wait_until(lambda: not info.is_alive(), "GCS and raylet are gone")
    assert find(project) is None
    refused = subprocess.run(  # in a process of its own: this one is attached to the suite's cluster
        [sys.executable, "-c", ATTACH, str(info.record)],
        env=outside_environment(PYTHONPATH=str(Path(lifecycle.__file__).parents[2])),
        capture_output=True,
        text=True,
        timeout=120,
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
    wait_for_own_answer(again)


def test_two_clusters_do_not_meet(clusters: Started, project: Path, cluster: ClusterInfo) -> None:
    own = clusters.up(project)
    try:
        for info in (own, cluster):
            wait_for_own_answer(info)
        for info in (own, cluster):
            assert answer(info) == info.cluster_id
        first, second = (
            {item.port for item in processes.listeners(info.cluster_id)} for info in (own, cluster)
        )
        assert not first & second
        down(project)
        assert processes.find(own.cluster_id) == []
        assert answer(cluster) == cluster.cluster_id
        assert cluster.is_alive()
    finally:
        deploy(cluster, apps="")
