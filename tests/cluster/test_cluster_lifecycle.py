"""Bringing clusters up and down, as far as it goes without one: what is refused, and what is cleaned."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_projects import write_project, write_record

from shoal import config as shoal_config
from shoal.cluster import ClusterInfo, doctor, down, lifecycle, processes, ray_edge, up
from shoal.cluster import info as cluster_info
from shoal.cluster import start as starting
from shoal.errors import AccessError, ClusterError, RequestError, StorageError


class Started(Exception):
    """Raised in place of a start: the checks before it have passed."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which nothing can really start."""

    def no_start(plan: Any, say: Any) -> None:
        raise Started

    monkeypatch.setattr(starting, "start", no_start)
    monkeypatch.setattr(cluster_info, "runtime_root", lambda: tmp_path / "run")
    return write_project(tmp_path / "project", "t")


def bring_up(project: Path, *overrides: str) -> Any:
    return up(shoal_config.load(project / "cluster.yaml", overrides=list(overrides)), project=project)


def test_with_nothing_wrong_a_start_is_tried(project: Path) -> None:
    with pytest.raises(Started):
        bring_up(project)


def test_a_taken_serve_port_names_its_holder(project: Path) -> None:
    with socket.socket() as server:
        server.bind((ray_edge.LOOPBACK, 0))
        server.listen(1)
        port = server.getsockname()[1]
        with pytest.raises(RequestError, match=rf"serve\.port {port} is taken by .*pid {os.getpid()}"):
            bring_up(project, f"serve.port={port}")


def test_another_ray_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_edge, "installed_ray_version", lambda: "2.59.0")
    with pytest.raises(RequestError, match=r"needs Ray 2\.60\.0, found 2\.59\.0: pip install"):
        bring_up(project)


def test_another_python_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_edge, "PYTHON_VERSION", (3, 99))
    with pytest.raises(RequestError, match=r"needs Python 3\.99, found 3\.11"):
        bring_up(project)


def test_storage_that_is_no_folder_is_refused(project: Path) -> None:
    (project / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        bring_up(project, "storage=file")


def test_a_full_disk_and_a_file_in_the_way_are_said(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(plan: Any, say: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/token")

    monkeypatch.setattr(starting, "start", full)
    with pytest.raises(ClusterError, match=r"cannot be started in .*No space left on device"):
        bring_up(project)
    shutil.rmtree(project / ".shoal")
    (project / ".shoal").write_text("")
    with pytest.raises(StorageError, match=r"cannot make the folder .*\.shoal"):
        bring_up(project)


def test_another_target_is_refused(project: Path) -> None:
    with pytest.raises(RequestError, match="onprem"):
        bring_up(project, "target=onprem", "targets.onprem.hosts=[h]", "targets.onprem.ssh_user=u")


def test_what_a_killed_start_left_is_cleaned_by_down(project: Path) -> None:
    with pytest.raises(Started):
        bring_up(project)
    marker = project / ".shoal" / lifecycle.STARTING_NAME
    run_dir = cluster_info.run_dir_of(json.loads(marker.read_text())["cluster_id"])
    run_dir.mkdir()
    assert down(project)
    assert not marker.exists()
    assert not run_dir.exists()
    assert not down(project)


@pytest.mark.parametrize("cluster_id", ["d" * 16, "none", "", "../keep/0123456789", "d" * 16 + "\n", None, 7])
@pytest.mark.parametrize("run_dir", ["{keep}", "{run}/..", "{run}/../keep", "{run}"])
def test_down_removes_no_folder_that_is_not_a_clusters(
    project: Path, tmp_path: Path, cluster_id: Any, run_dir: str
) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (tmp_path / "run").mkdir()
    (project / ".shoal").mkdir()
    record = {"cluster_id": cluster_id, "run_dir": run_dir.format(run=tmp_path / "run", keep=keep)}
    for name in (lifecycle.STARTING_NAME, cluster_info.RECORD_NAME):
        (project / ".shoal" / name).write_text(json.dumps(record))
    down(project)
    assert keep.is_dir()
    assert list((project / ".shoal").glob("*.json")) == []


@pytest.fixture
def marked(info: ClusterInfo, project: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process that belongs to ``info``'s cluster of ``project``."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**options: Any) -> subprocess.Popen[bytes]:
        environment = {
            processes.CLUSTER_ID: info.cluster_id,
            processes.RECORD: str(project / ".shoal" / "cluster.json"),
        }
        started.append(subprocess.Popen(["sleep", "100"], env=environment, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def recorded(info: ClusterInfo, project: Path) -> ClusterInfo:
    """The record of a cluster of ``project`` whose head processes are this test's."""
    run_dir = cluster_info.run_dir_of(info.cluster_id)
    info = dataclasses.replace(info, project=project, run_dir=run_dir, token_path=run_dir / "token")
    write_record(info)
    return info


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_of_a_project_leaves_the_originals_cluster_alone(
    project: Path, info: ClusterInfo, tmp_path: Path, marked: Callable[..., subprocess.Popen[bytes]]
) -> None:
    recorded(info, project)
    process = marked()
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    before = contents(project)
    said: list[str] = []
    assert not down(copy, say=said.append)
    assert said == [f"{copy}/.shoal/cluster.json came with a copy of {project}, whose cluster is left alone"]
    assert process.poll() is None
    assert contents(project) == before
    assert not (copy / ".shoal" / "cluster.json").exists()
    assert down(project)
    process.wait(20)


@pytest.mark.parametrize("name", [cluster_info.RECORD_NAME, lifecycle.STARTING_NAME])
def test_up_in_a_copy_of_a_project_starts_a_cluster_of_its_own(
    project: Path,
    info: ClusterInfo,
    tmp_path: Path,
    marked: Callable[..., subprocess.Popen[bytes]],
    name: str,
) -> None:
    record = json.dumps(recorded(info, project).to_json())
    (project / ".shoal" / "cluster.json").rename(project / ".shoal" / name)
    process = marked()
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    with pytest.raises(Started):
        bring_up(copy)
    assert process.poll() is None
    assert (project / ".shoal" / name).read_text() == record
    assert not (copy / ".shoal" / "cluster.json").exists(), "the record that came with the copy"
    marker = json.loads((copy / ".shoal" / lifecycle.STARTING_NAME).read_text())
    assert marker["project"] == str(copy)
    assert marker["cluster_id"] != info.cluster_id


@pytest.mark.parametrize("name", [cluster_info.RECORD_NAME, lifecycle.STARTING_NAME])
@pytest.mark.parametrize("act", [bring_up, down])
def test_root_does_not_end_another_users_cluster(
    project: Path,
    info: ClusterInfo,
    monkeypatch: pytest.MonkeyPatch,
    marked: Callable[..., subprocess.Popen[bytes]],
    act: Callable[[Path], object],
    name: str,
) -> None:
    recorded(info, project)
    (project / ".shoal" / "cluster.json").rename(project / ".shoal" / name)
    process = marked()
    before = contents(project)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(AccessError, match=f"{name} belongs to .* as that user"):
        act(project)
    assert process.poll() is None
    assert contents(project) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root sees the processes of others")
@pytest.mark.parametrize("act", [bring_up, down])
def test_root_does_not_end_another_users_processes_when_the_record_is_gone(
    project: Path, marked: Callable[..., subprocess.Popen[bytes]], act: Callable[[Path], object]
) -> None:
    (project / ".shoal").mkdir()
    process = marked(user=65534)
    with pytest.raises(AccessError, match=rf"runs as another user: sleep \({process.pid}\)"):
        act(project)
    assert process.poll() is None


def test_down_without_a_cluster_changes_nothing(tmp_path: Path) -> None:
    assert not down(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_down_cleans_a_broken_record(project: Path) -> None:
    (project / ".shoal").mkdir()
    (project / ".shoal" / "cluster.json").write_text("{")
    down(project)
    assert not (project / ".shoal" / "cluster.json").exists()


def test_the_clusters_environment_is_complete(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "another:1")
    monkeypatch.setenv("PYTHONPATH", "/extra")
    plan, _ = lifecycle.plan_start(shoal_config.load(project / "cluster.yaml"), project=project)
    environment = starting.cluster_process_environment(
        plan, starting.port_plan.plan(20_000, serve_port=0), Path("/token")
    )
    assert "RAY_ADDRESS" not in environment  # a cluster must not take itself for a client of another one
    library = str(Path(starting.__file__).parents[2])
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(project), library, "/extra"]
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["SHOAL_CLUSTER"] == str(project / ".shoal" / "cluster.json")
    assert environment["SHOAL_CLUSTER_ID"] == plan.cluster_id
    assert environment["RAY_AUTH_MODE"] == "token"


def test_doctor_names_what_is_wrong_without_a_cluster(project: Path) -> None:
    with socket.socket() as server:
        server.bind((ray_edge.LOOPBACK, 0))
        server.listen(1)
        findings = doctor(project, serve_port=server.getsockname()[1], storage=project / "cluster.yaml")
    wrong = {finding.subject: finding for finding in findings if finding.level == "error"}
    assert wrong.keys() >= {"serve port", "storage"}
    assert all(finding.next_step for finding in wrong.values())


def test_doctor_says_how_to_clean_a_broken_record(project: Path) -> None:
    (project / ".shoal").mkdir()
    (project / ".shoal" / "cluster.json").write_text("{")
    assert ("record", "shoal down") in {(finding.subject, finding.next_step) for finding in doctor(project)}


@pytest.mark.parametrize("dies", [False, True])
def test_a_cluster_that_runs_and_is_silent_is_not_ended(
    project: Path, info: ClusterInfo, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    run_dir = cluster_info.run_dir_of(info.cluster_id)
    info = dataclasses.replace(info, project=project, run_dir=run_dir, token_path=run_dir / "token")
    write_record(info)

    def silent(asked: ClusterInfo, *, timeout_s: float) -> bool:
        if dies:
            monkeypatch.setattr(ClusterInfo, "is_alive", lambda _: False)
        return False

    abandoned: list[str] = []
    monkeypatch.setattr(starting, "answers_within", silent)
    monkeypatch.setattr(starting, "abandon", abandoned.append)
    with pytest.raises(
        Started if dies else ClusterError, match=None if dies else "does not answer.*shoal down"
    ):
        bring_up(project)
    assert abandoned == ([info.cluster_id] if dies else [])


def test_a_cluster_that_answers_for_the_last_time_does_not_run(
    info: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_answer(*_: object) -> bool:
        monkeypatch.setattr(ClusterInfo, "is_alive", lambda _: False)
        return True

    monkeypatch.setattr(starting, "answers", last_answer)
    assert not starting.answers_within(info, timeout_s=9)
