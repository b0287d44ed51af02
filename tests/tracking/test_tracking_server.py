"""A real MLflow server by URL: away, there, away, there again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import requests

from shoal.errors import TrackingError
from shoal.storage import Storage, commit
from shoal.tracking import Registry, RunRecord, Tracker
from shoal.tracking.mlflow_store import MlflowStore
from waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def server(folder, port):
    """An MLflow server on ``port`` until the block ends, its store in ``folder``."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }

    def is_healthy() -> bool:
        assert process.poll() is None, log_text()
        with suppress(requests.RequestException):  # not yet, or too busy to answer
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
        return False

    def log_text() -> str:
        return (folder / "server.log").read_text()

    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **quiet}, cwd=folder, start_new_session=True
        )
    try:
        wait_until(is_healthy, log_text)
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait(timeout=30)


def test_what_a_server_missed_is_delivered_when_it_is_back(tmp_path, migrated_db, port):
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(migrated_db, folder / "server.db")
    storage = Storage(tmp_path / "storage")
    uri = f"http://127.0.0.1:{port}"
    tracker = Tracker(storage, uri)
    registry = Registry(tracker.registry, storage)
    record = RunRecord(storage, "digits-1")
    record.claim_identity({"recipe": "jobs.digits:Digits", "fields": {"lr": 0.1}})
    record.append("start", step=0, target_steps=30)

    def train(steps):
        for step in steps:
            record.append("metrics", step=step, values={"loss": 1 / step})

    train(range(1, 11))
    before = time.monotonic()
    status = tracker.flush()
    assert time.monotonic() - before < 20, "a server that is not there must not be waited for"
    assert status.state == "error"
    assert status.error.startswith(f"tracking at {uri} does not answer: Connection refused (")
    with pytest.raises(TrackingError, match=f"{port} does not answer"):
        registry.models()

    with server(folder, port):
        assert tracker.flush().state == "ok"
        registry.register("digits", write, run="digits-1", alias="champion")
        assert registry.resolve("digits@champion").version == 1
    train(range(11, 21))
    assert tracker.flush().state == "error"
    with pytest.raises(TrackingError, match="does not answer"):
        registry.register("digits", write)
    train(range(21, 31))
    record.append("end", step=30, state="failed", error="boom", traceback="Traceback: boom")

    with server(folder, port):
        assert tracker.flush().state == "ok"
        assert registry.register("digits", write).version == 2
        client = MlflowStore(uri, artifacts_dir=tmp_path).client
        (experiment,) = [it for it in client.search_experiments() if it.name == "Digits"]
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in sorted(history, key=lambda it: it.step)] == list(range(1, 31))
        assert run.info.status == "FAILED"
        assert {it.path for it in client.list_artifacts(run.info.run_id)} == {
            "identity.json",
            "timeline.json",
            "traceback.txt",
        }
    tracker.close()


def write(directory, version):
    commit(directory, lambda folder: (folder / "weights").write_text(str(version)) and None, meta={})
