"""A job as a guest: on a Ray cluster that has the dependencies, and neither shoal nor this project."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from projects import ROOT, outside_environment
from shoal.cluster import ports, processes, ray_edge
from shoal.cluster.guest import this_cluster
from shoal.errors import ConfigError
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from waiting import DEADLINE_S, wait_until

WITHOUT_SHOAL = """
import os, sys
sys.path[:] = [p for p in sys.path if "_ray_pkg_" in p or not os.path.isdir(os.path.join(p, "shoal"))]
"""
"""A ``sitecustomize.py`` that takes away the shoal which this Python has installed, but not one that a job brings."""


@dataclass(frozen=True)
class Plain:
    """A cluster as ``ray start --head`` makes it."""

    url: str
    environment: dict[str, str]

    def ray(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run ``ray WORDS...`` in a shell that knows the cluster."""
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            cwd=cwd,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    hidden = tmp_path_factory.mktemp("without-shoal")
    (hidden / "sitecustomize.py").write_text(WITHOUT_SHOAL)
    run_dir = Path(tempfile.mkdtemp(prefix="plain-", dir="/tmp"))  # short: unix sockets live below it
    token = run_dir / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    chosen = ports.choose(serve_port=0, taken_blocks=[])
    assert chosen is not None
    plan = chosen[1]
    mark = secrets.token_hex(8)
    environment = outside_environment(
        PYTHONPATH=str(hidden),
        DASHBOARD_METRIC_PORT=str(plan["dashboard_metrics"]),
        AUTOSCALER_METRIC_PORT=str(plan["autoscaler_metrics"]),
        **ray_edge.auth_environment(token),
        **ray_edge.node_environment(),
    )
    start = [sys.executable, "-m", "ray.scripts.scripts"]
    start += ray_edge.start_arguments(plan, run_dir, num_cpus=3, num_gpus=0)
    try:
        subprocess.run(
            start,
            env={**environment, processes.CLUSTER_ID: mark, "SPT_NOENV": "1"},
            cwd=run_dir,
            stdout=subprocess.DEVNULL,
            timeout=DEADLINE_S,
            check=True,
        )
        yield Plain(f"http://127.0.0.1:{plan['dashboard']}", environment)
    finally:
        left = processes.stop(mark, grace_s=3.0, deadline_s=20.0)
        shutil.rmtree(run_dir, ignore_errors=True)
    assert not left, processes.describe(left)


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """This project as it is checked out, with storage that stays."""
    folder = tmp_path / "upload"
    for part in ("jobs", "platform"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    storage = tmp_path / "storage"
    (folder / "cluster.yaml").write_text(f"version: 1\nname: guest\nstorage: {storage}\n")
    return folder


@pytest.mark.slow
def test_it_trains_where_neither_shoal_nor_the_project_is_known(plain: Plain, upload: Path) -> None:
    unknown = subprocess.run(
        [sys.executable, "-c", "import shoal"],
        env=plain.environment,
        cwd=upload.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'shoal'" in unknown.stderr, "the cluster must not have shoal"
    train = ["python", "-m", "jobs.digits", "train", "hidden=16", "--name=guest"]
    job = [*train, "--workers=2", "--steps=60"]
    done = plain.ray("job", "submit", "--working-dir=.", "--", *job, cwd=upload)
    assert done.returncode == 0, done.stdout
    storage = Storage(upload.parent / "storage")
    record = RunRecord(storage, "guest")
    assert record.state() == RunState.FINISHED, done.stdout
    assert record.events(("start",))[-1]["workers"] == 2
    assert not (upload / ".shoal").exists()

    submit = ["job", "submit", "--no-wait", "--submission-id=guest-2", "--working-dir=.", "--"]
    assert plain.ray(*submit, *train, "--workers=1", "--steps=1000000", cwd=upload).returncode == 0

    def logs() -> str:
        return plain.ray("job", "logs", "guest-2", cwd=upload).stdout

    wait_until(lambda: record.state() == RunState.RUNNING and record.step >= 70, logs)
    stopped = plain.ray("job", "stop", "guest-2", cwd=upload)
    assert stopped.returncode == 0, stopped.stdout
    assert record.state() == RunState.STOPPED, logs()
    assert record.events(("checkpoint",))[-1]["step"] == record.step
    assert record.events(("start",))[-1]["source"] == "checkpoint"


def guest(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> None:
    """Make this process look like a job's driver in ``folder``, its ``cluster.yaml`` with these settings."""
    monkeypatch.delenv("SHOAL_CLUSTER", raising=False)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    (folder / "cluster.yaml").write_text(json.dumps({"version": 1, "name": "guest", **settings}))
    monkeypatch.chdir(folder)


def test_a_guest_may_keep_runs_beside_the_jobs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that begins as the folder's does is not in it."""
    (folder := tmp_path / "job").mkdir()
    guest(monkeypatch, folder, storage=f"{folder}2", tracking=f"sqlite:///{folder}2/mlflow.db")
    info = this_cluster()
    assert info is not None
    assert info.storage == tmp_path / "job2"


def test_a_guest_is_refused_a_link_into_the_jobs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "job").mkdir()
    (tmp_path / "link").symlink_to(folder)
    guest(monkeypatch, folder, storage=str(tmp_path / "link" / "runs"))
    with pytest.raises(ConfigError, match="throws away"):
        this_cluster()


def test_a_guest_reads_its_file_for_what_a_record_would_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest(monkeypatch, tmp_path, storage="/mnt/runs")
    info = this_cluster()
    assert info is not None
    assert (info.address, info.storage, info.project) == ("127.0.0.1:6379", Path("/mnt/runs"), tmp_path)
    assert info.is_foreign
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert this_cluster() is None, "only a job is a guest"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["storage: "]),
        ({"storage": "runs", "tracking": "sqlite:///mlflow.db"}, ["storage: ", "tracking: "]),
        ({"storage": "/mnt/runs", "tracking": "sqlite:///mlflow.db"}, ["tracking: "]),
    ],
)
def test_a_guest_never_keeps_runs_in_the_jobs_throw_away_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], expected: list[str]
) -> None:
    guest(monkeypatch, tmp_path, **settings)
    with pytest.raises(ConfigError) as refused:
        this_cluster()
    assert [f"{problem.path}: " for problem in refused.value.problems] == expected
    assert "SHOAL_SET_" in str(refused.value)
    assert not list(tmp_path.glob(".shoal"))
