"""One real cluster, as its users meet it: who can reach it, what clients need, what it tells about itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from projects import outside_environment
from shoal import config as shoal_config
from shoal.cluster import ClusterInfo, dashboard, doctor, down, environment, find, processes, status, up
from shoal.errors import AccessError, RequestError
from waiting import wait_until

pytestmark = pytest.mark.cluster

BIN = Path(sys.executable).parent
APP = """\
from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Hello:
    async def __call__(self, request):
        return "hello"


app = Hello.bind()
"""
DEPLOY = "applications: [{name: hello, route_prefix: /, import_path: 'hello_app:app'}]\n"


def client(info: ClusterInfo, *command: str, timeout_s: float = 180) -> str:
    """Run a program as a user would after `shoal env`; returns what it printed."""
    done = subprocess.run(
        command,
        env=outside_environment(**environment(info)),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fetch(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return str(answer.read().decode())
    except OSError:
        return None


@pytest.fixture(scope="module")
def served(running: ClusterInfo) -> ClusterInfo:
    """The cluster with an app that a plain `serve deploy` put there."""
    (running.project / "hello_app.py").write_text(APP)
    (running.project / "hello.yaml").write_text(DEPLOY)
    client(running, str(BIN / "serve"), "deploy", str(running.project / "hello.yaml"))
    return running


def test_every_listener_is_on_loopback_with_an_app_that_serves(served: ClusterInfo) -> None:
    wait_until(lambda: fetch(served.serve_url) == "hello", f"{served.serve_url} answers")
    own = {served.ports[name] for name in ("serve", "haproxy_stats", "haproxy_metrics")}

    def haproxy_listens_on_its_ports() -> bool:
        # HAProxy is replaced by a new process whenever an app changes.
        return {
            item.port for item in processes.listeners(served.cluster_id) if item.process == "haproxy"
        } == own

    wait_until(haproxy_listens_on_its_ports, f"HAProxy listens on {sorted(own)} and nowhere else")
    found = processes.listeners(served.cluster_id)
    assert [item for item in found if not item.is_loopback] == []
    assert any("ServeReplica" in item.process for item in found)
    known = set(served.ports.values())
    fixed = {item.port for item in found if item.port < 32768}
    assert fixed <= known, "a fixed port that is not per cluster"


def test_headers_must_come_in_time_and_bodies_need_not(served: ClusterInfo) -> None:
    wait_until(lambda: fetch(served.serve_url) == "hello", f"{served.serve_url} answers")
    there = ("127.0.0.1", served.serve_port)
    with socket.create_connection(there, 60) as upload, socket.create_connection(there, 60) as slow:
        upload.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\na")
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
        assert slow.makefile("rb").read().startswith(b"HTTP/1.1 408")  # blocks until HAProxy has had enough
        upload.sendall(b"b")
        assert upload.makefile("rb").read().startswith(b"HTTP/1.1 200")


def test_record_and_token_are_private(running: ClusterInfo) -> None:
    assert running.record.stat().st_mode & 0o777 == 0o600
    assert running.token_path.stat().st_mode & 0o777 == 0o600
    assert running.run_dir.stat().st_mode & 0o777 == 0o700
    token = running.token_path.read_text()
    assert token not in running.record.read_text()
    assert not [
        path for path in running.session_dir.rglob("*.log") if token in path.read_text(errors="replace")
    ], "a log holds the token"


def test_a_wrong_token_is_refused(running: ClusterInfo, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("f" * 64)
    with pytest.raises(AccessError, match="refuses the token"):
        dashboard.get(running.dashboard_url, "/api/version", tmp_path / "wrong")


@pytest.mark.parametrize("path", ["/api/version", "/api/jobs/", "/api/v0/actors", "/api/serve/applications/"])
def test_no_token_is_refused(running: ClusterInfo, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(running.dashboard_url + path, timeout=30)


def test_up_again_is_the_same_cluster_and_says_so(running: ClusterInfo) -> None:
    said: list[str] = []
    config = shoal_config.load(running.project / "cluster.yaml")
    assert up(config, project=running.project, say=said.append) == running
    assert said == [f"cluster 'shared' is already up: {running.dashboard_url}"]
    assert find(running.project) == running


def test_up_with_another_config_shows_both_values(running: ClusterInfo) -> None:
    changed = shoal_config.load(running.project / "cluster.yaml", overrides=["serve.max_queue=7"])
    with pytest.raises(
        RequestError, match=r"serve\.max_queue: running 200, file 7\n.*shoal down && shoal up"
    ):
        up(changed, project=running.project)
    assert running.is_alive()


def test_down_from_inside_the_cluster_is_refused(
    running: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(processes.CLUSTER_ID, running.cluster_id)
    with pytest.raises(RequestError, match="from inside the cluster"):
        down(running.project)
    assert running.is_alive()


ATTACH = """
import ray  # before the environment is set, as a notebook may
import sys, psutil
from pathlib import Path
from shoal.cluster import attach, detach, find
info = find(Path(sys.argv[1]))
attach(info)
attach(info)
assert ray.get_runtime_context().namespace == "shoal"
@ray.remote(num_cpus=1)
class Holder:
    def ready(self): return True
holder = Holder.options(name="the-holder").remote()
assert ray.get(holder.ready.remote())
from shoal.cluster import status
now = status(info)
held = sum(h.resources.get("CPU", 0) for h in now.holders)
assert abs(now.free["CPU"] - (now.total["CPU"] - held)) < 1e-6, now
assert [dict(h.resources) for h in now.holders if h.name == "the-holder"] == [{"CPU": 1.0}]
listening = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
assert all("127.0.0.1" in ip for ip in listening), listening
detach()
print("done")
"""


def test_a_process_that_imported_ray_attaches_and_listens_on_loopback(running: ClusterInfo) -> None:
    # Without our environment: attach must set all it needs.
    done = subprocess.run(
        [sys.executable, "-c", ATTACH, str(running.project)],
        env=outside_environment(PYTHONPATH=str(Path(dashboard.__file__).parents[2])),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
    assert done.stderr == ""


def test_status_needs_no_attached_process(running: ClusterInfo) -> None:
    now = status(running)
    assert now.total["CPU"] == 2
    assert now.num_processes > 5


def test_doctor_finds_nothing_wrong(running: ClusterInfo) -> None:
    about = [finding for finding in doctor(running.project) if finding.subject != "orphans"]
    assert [finding for finding in about if finding.level == "error"] == []


def test_doctor_sees_a_token_that_others_can_read(running: ClusterInfo) -> None:
    running.token_path.chmod(0o644)
    try:
        wrong = [finding for finding in doctor(running.project) if finding.subject == "token"]
    finally:
        running.token_path.chmod(0o600)
    assert [finding.level for finding in wrong] == ["error"]
    assert "chmod 600" in wrong[0].next_step


FREE = """\
import sys
from pathlib import Path
from shoal.capacity import snapshot
from shoal.cluster import attach, find
attach(find(Path(sys.argv[1])))
(node,) = snapshot().nodes
assert node.total["CPU"] >= node.free["CPU"] > 0, node
print("done")
"""


def test_the_raylet_says_what_is_free(running: ClusterInfo) -> None:
    path = str(Path(dashboard.__file__).parents[2])
    assert (
        client(running, "env", f"PYTHONPATH={path}", sys.executable, "-c", FREE, str(running.project))
        == "done\n"
    )
