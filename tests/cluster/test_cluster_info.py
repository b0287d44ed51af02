"""The record of a cluster: what is written, what is read back, and who counts as running."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import psutil
import pytest
from cluster_projects import write_record as write

from shoal.cluster import info as cluster_info
from shoal.cluster import ports, processes, ray_edge
from shoal.cluster.info import ClusterInfo
from shoal.errors import AccessError, ClusterError


def test_a_record_reads_back_as_it_was(info: ClusterInfo) -> None:
    write(info)
    assert cluster_info.find(info.project) == info


def test_a_record_of_dead_processes_is_no_cluster(info: ClusterInfo) -> None:
    later = dataclasses.replace(info.pids["gcs"], started=info.pids["gcs"].started + 1)
    write(dataclasses.replace(info, pids={**info.pids, "gcs": later}))
    assert cluster_info.find(info.project) is None


def test_a_record_of_another_boot_is_no_cluster(info: ClusterInfo) -> None:
    earlier = dataclasses.replace(info.pids["gcs"], boot="0" * 8)
    write(dataclasses.replace(info, pids={**info.pids, "gcs": earlier}))
    assert cluster_info.find(info.project) is None


def test_a_clock_that_is_set_ends_no_cluster(info: ClusterInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    write(info)
    before = psutil.Process().create_time()
    boot_time = psutil._pslinux.boot_time  # type: ignore[attr-defined]
    # What a process sees that starts after the clock was set: the kernel's boot time moves with it.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_time() + 3600)
    assert psutil.Process().create_time() == pytest.approx(before + 3600, abs=1)
    assert cluster_info.find(info.project) == info


def test_no_record_is_no_cluster(tmp_path: Path) -> None:
    assert cluster_info.find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 2, "name": "x"}'])
def test_a_broken_record_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / ".shoal").mkdir()
    (tmp_path / ".shoal" / "cluster.json").write_text(text)
    with pytest.raises(ClusterError, match="shoal down"):
        cluster_info.find(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("cluster_id", "", "16 hex digits"),
        ("cluster_id", "0123456789ABCDEF", "16 hex digits"),
        ("cluster_id", "0123456789abcdef0", "16 hex digits"),
        ("cluster_id", "fedcba9876543210", "its folder"),
        ("run_dir", "/tmp", "its folder"),
        ("token_path", "/home/me/.cache/huggingface/token", "its folder"),
        ("pids", {}, "not gcs and raylet"),
        ("pids", {"gcs": {"pid": 1, "started": 1, "boot": "0"}}, "not gcs and raylet"),
        (
            "pids",
            {role: {"pid": "../x", "started": 1, "boot": "0"} for role in ("gcs", "raylet")},
            "no numbers",
        ),
        ("dashboard_url", "http://203.0.113.1:8265", "not a port of"),
        ("dashboard_url", "http://127.0.0.1:8265@203.0.113.1:80", "not a port of"),
        ("dashboard_url", "http://127.0.0.1:8265\n", "not a port of"),
        ("dashboard_url", "http://127.0.0.2:8265", "not a port of"),
        ("address", "203.0.113.1:6379", "not a port of"),
    ],
)
def test_a_record_that_came_with_the_project_is_not_believed(
    info: ClusterInfo, field: str, value: object, named: str
) -> None:
    info.record.parent.mkdir()
    info.record.write_text(json.dumps({**info.to_json(), field: value}))
    with pytest.raises(ClusterError, match=f"{named}.*shoal down"):
        cluster_info.find(info.project)


def test_a_record_whose_folder_is_a_link_is_not_believed(info: ClusterInfo, tmp_path: Path) -> None:
    write(info)
    info.run_dir.rename(tmp_path / "mine")
    info.run_dir.symlink_to(tmp_path / "mine")
    with pytest.raises(ClusterError, match="must be a folder of this user"):
        cluster_info.find(info.project)


def test_another_users_record_is_refused_before_it_is_read(
    info: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    info.record.parent.mkdir()
    info.record.write_text("whatever is in it")
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(AccessError, match=r"cluster\.json belongs to .*Nothing was changed.*as that user"):
        cluster_info.find(info.project)


def test_a_record_in_a_copy_of_the_folder_is_no_cluster(info: ClusterInfo, tmp_path: Path) -> None:
    project = tmp_path / "project"
    info = dataclasses.replace(info, project=project)
    info.record.parent.mkdir(parents=True)
    write(info)
    shutil.copytree(project, tmp_path / "copy")
    assert cluster_info.find(tmp_path / "copy") is None
    assert cluster_info.find(project) == info
    (tmp_path / "link").symlink_to(project)
    assert cluster_info.find(tmp_path / "link") == info, "the same folder under another name"
    project.rename(tmp_path / "moved")
    assert cluster_info.find(tmp_path / "moved") is None


@pytest.mark.timeout(20)
def test_a_record_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".shoal").mkdir()
    os.mkfifo(tmp_path / ".shoal" / "cluster.json")
    with pytest.raises(ClusterError, match=r"a pipe.*shoal down"):
        cluster_info.find(tmp_path)


def test_a_record_whose_folder_was_swept_away_still_reads(info: ClusterInfo) -> None:
    write(info)
    info.run_dir.rmdir()
    assert cluster_info.read_record(info.record) == info


def test_the_environment_of_clients_never_marks_them_as_the_cluster(info: ClusterInfo) -> None:
    # A shell with the id in it would be ended by `shoal down`.
    assert processes.CLUSTER_ID not in cluster_info.environment(info)
    assert processes.CLUSTER_ID not in cluster_info.driver_environment(info)


def test_the_environment_holds_no_token(info: ClusterInfo) -> None:
    info.token_path.write_text("secret-token")
    assert "secret-token" not in str(cluster_info.driver_environment(info))
    assert "secret-token" not in repr(info)


def test_a_process_finds_its_cluster_by_environment(
    info: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(info)
    monkeypatch.setenv("SHOAL_CLUSTER", str(info.record))
    assert ClusterInfo.from_env() == info


def test_a_process_without_a_cluster_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_CLUSTER", raising=False)
    assert ClusterInfo.from_env() is None


def test_a_cluster_that_is_gone_is_an_error_not_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CLUSTER", str(tmp_path / "cluster.json"))
    with pytest.raises(ClusterError, match="shoal up"):
        ClusterInfo.from_env()


def test_differences_name_the_field_and_both_values(info: ClusterInfo) -> None:
    wanted = {"name": "t", "serve": {"port": 9000, "replicas": "1..3"}, "tracking": "http://x"}
    assert cluster_info.differences(info, wanted) == [
        "serve.port: running 0, file 9000",
        'tracking: running nothing, file "http://x"',
    ]


def test_the_same_config_does_not_differ(info: ClusterInfo) -> None:
    assert cluster_info.differences(info, json.loads(json.dumps(info.config))) == []


@pytest.mark.parametrize("field", ["ray_version", "python_version"])
def test_another_version_says_both(info: ClusterInfo, field: str) -> None:
    other = dataclasses.replace(info, **{field: "0.0.1"})
    with pytest.raises(ClusterError, match=r"0\.0\.1 in the cluster"):
        cluster_info.check_versions(other)


def test_sockets_below_the_longest_run_dir_are_short_enough() -> None:
    run_dir = Path(f"/tmp/shoal-{2**32 - 1}/01234567")
    settings = ray_edge.serve_environment(ports.plan(20_000, serve_port=0), run_dir, 1)
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        path = Path(settings[name])
        bound = path.parent / ("f" * ray_edge.NUM_NODE_ID_CHARACTERS) / path.name
        assert len(str(bound)) <= ray_edge.MAX_HAPROXY_SOCKET_PATH
    session = "session_2026-11-23_02-19-54_427253_4194304/sockets/plasma_store"
    assert len(str(ray_edge.ray_dir(run_dir) / session)) <= 107
