"""Processes of a cluster: known by their environment, ended without touching others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from shoal.cluster import haproxy_launch, processes, start
from shoal.errors import ClusterError
from waiting import wait_until

READY = "print('ready', flush=True)"
SLEEP = f"import signal; {READY}; signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}; signal.pause()"

Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    with ExitStack() as stack:

        def run(code: str, **marks: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", code], env={**os.environ, **marks}, stdout=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline()
            return process

        yield run


def test_only_the_clusters_own_processes_are_found(spawn: Spawn) -> None:
    ours = spawn(SLEEP, SHOAL_CLUSTER_ID="a" * 16)
    spawn(SLEEP, SHOAL_CLUSTER_ID="b" * 16)
    assert [process.pid for process in processes.find("a" * 16)] == [ours.pid]


def test_a_child_that_emptied_its_environment_belongs_too(spawn: Spawn) -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', 'input()'], "
    parent = spawn(f"{child}stdin=subprocess.PIPE, env={{}}); {READY}; p.wait()", SHOAL_CLUSTER_ID="a" * 16)
    assert len(processes.find("a" * 16)) == 2
    assert processes.stop("a" * 16, grace_s=20, deadline_s=60) == []
    assert parent.wait(timeout=60) is not None


def test_stop_ends_the_cluster_and_nothing_else(spawn: Spawn) -> None:
    ours = spawn(SLEEP, SHOAL_CLUSTER_ID="a" * 16)
    other = spawn(SLEEP, SHOAL_CLUSTER_ID="b" * 16)
    assert processes.stop("a" * 16, grace_s=20, deadline_s=60) == []
    assert ours.poll() is not None
    assert other.poll() is None


def test_stop_kills_what_does_not_listen(spawn: Spawn) -> None:
    ours = spawn(STUBBORN, SHOAL_CLUSTER_ID="a" * 16)
    assert processes.stop("a" * 16, grace_s=0.2, deadline_s=60) == []
    assert ours.poll() is not None


def test_stop_says_what_is_left_when_time_is_up(spawn: Spawn) -> None:
    ours = spawn(STUBBORN, SHOAL_CLUSTER_ID="a" * 16)
    assert [process.pid for process in processes.stop("a" * 16, grace_s=9, deadline_s=0.3)] == [ours.pid]


def test_a_process_that_we_may_not_end_keeps_nobody_else_alive(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = (spawn(SLEEP, SHOAL_CLUSTER_ID="a" * 16) for _ in range(2))
    signals = psutil.Process.send_signal

    def refuse(process: psutil.Process, sig: int) -> None:
        if process.pid == theirs.pid:
            raise psutil.AccessDenied(process.pid)
        signals(process, sig)

    monkeypatch.setattr(psutil.Process, "terminate", lambda process: refuse(process, signal.SIGTERM))
    monkeypatch.setattr(psutil.Process, "kill", lambda process: refuse(process, signal.SIGKILL))
    left = processes.stop("a" * 16, grace_s=0.2, deadline_s=1)
    assert [process.pid for process in left] == [theirs.pid]
    assert ours.wait(60) is not None


def test_the_process_that_looks_is_never_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        processes, "cluster_id_of", lambda process: "a" * 16 if process.pid == os.getpid() else None
    )
    assert os.getpid() not in {process.pid for process in processes.find("a" * 16)}


def test_claims_name_the_record(spawn: Spawn, tmp_path: Path) -> None:
    record = tmp_path / ".shoal" / "cluster.json"
    ours = spawn(SLEEP, SHOAL_CLUSTER_ID="a" * 16, SHOAL_CLUSTER=str(record))
    assert [process.pid for process in processes.claims()[("a" * 16, record)]] == [ours.pid]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_what_counts_as_loopback(address: str) -> None:
    assert processes.Listener(1, "x", address, 80).is_loopback


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1"])
def test_what_does_not_count_as_loopback(address: str) -> None:
    assert not processes.Listener(1, "x", address, 80).is_loopback


def test_a_private_folder_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    for name in ("fresh", "open"):
        start.private_dir(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_a_private_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ClusterError, match="must be a folder of this user"):
        start.private_dir(tmp_path / "link")


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(ClusterError, match="must be a folder of this user"):
        start.private_dir(tmp_path)


def test_the_token_is_private_from_the_start_and_never_the_same(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = start._write_token(tmp_path)
        first = path.read_text()
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(first) == 64
        assert start._write_token(tmp_path).read_text() != first
    finally:
        os.umask(before)


def test_haproxy_dies_with_whoever_started_it(spawn: Spawn, tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("stats socket /x mode 666 level admin\ndefaults\nbind :1\nbind *:2\nbind 127.0.0.1:3\n")
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o700)
    command = [sys.executable, "-I", "-S", haproxy_launch.__file__, str(fake), "-db", "-f", str(config)]
    marks = {"RAY_SERVE_HAPROXY_STATS_PORT": "1", "RAY_SERVE_HAPROXY_METRICS_PORT": "2"}
    marks |= {"SHOAL_SERVE_HOST": "127.0.0.1", "SHOAL_SERVE_PORT": "3", "SHOAL_CLUSTER_ID": "c" * 16}
    starter = spawn(f"import subprocess; p = subprocess.Popen({command!r}); {READY}; p.wait()", **marks)
    wait_until(
        lambda: any(process.name() == "sleep" for process in processes.find("c" * 16)),
        "HAProxy has started",
    )
    starter.kill()
    wait_until(lambda: not processes.find("c" * 16), "HAProxy has ended with its parent")
    assert "bind 127.0.0.1:1\nbind 127.0.0.1:2\nbind 127.0.0.1:3" in config.read_text()
