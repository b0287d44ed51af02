"""``ray job submit --working-dir . -- python -m jobs.NAME train`` from a folder the cluster does not know."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from projects import ROOT
from shoal.cluster import ClusterInfo
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from waiting import wait_until


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """A folder with a job of its own, and a cluster.yaml that means other storage."""
    folder = tmp_path / "upload"
    (folder / "jobs").mkdir(parents=True)
    shutil.copy(ROOT / "jobs" / "__init__.py", folder / "jobs" / "__init__.py")
    code = (ROOT / "jobs" / "digits.py").read_text().replace("class Digits", "class Uploaded")
    code = code.replace("shoal.main(Digits)", "shoal.main(Uploaded)")
    code = code.replace(
        "def build_model(self) -> Any:", "def build_model(self) -> Any:\n        print('uploaded')"
    )
    (folder / "jobs" / "uploaded.py").write_text(code)
    (folder / "cluster.yaml").write_text("version: 1\nname: elsewhere\nstorage: throw-away\n")
    return folder


@pytest.mark.cluster
def test_it_trains_into_the_clusters_storage_and_stops_with_a_checkpoint(
    cluster: ClusterInfo, upload: Path
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(cluster.dashboard_url)
    job = client.submit_job(
        entrypoint="python -m jobs.uploaded train hidden=16 --workers=1 --steps=1000000 --name=uploaded",
        runtime_env={"working_dir": str(upload)},
    )
    record = RunRecord(Storage(cluster.storage), "uploaded")

    def logs() -> str:
        return f"it goes on: {client.get_job_status(job)}\n{client.get_job_logs(job)}"

    wait_until(lambda: record.step >= 10 or client.get_job_status(job).is_terminal(), logs)
    assert record.state() == RunState.RUNNING, client.get_job_logs(job)
    client.stop_job(job)
    wait_until(lambda: client.get_job_status(job).is_terminal(), logs)
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert record.state() == RunState.STOPPED, client.get_job_logs(job)
    assert record.events(("checkpoint",))[-1]["step"] == record.step
    identity = record.identity()
    assert identity is not None
    assert identity["recipe"] == "jobs.uploaded:Uploaded"
    assert (record.logs_dir / "rank-0.log").read_text() == "uploaded\n"  # once: Ray Train's own print is off
