"""A job's main: the recipe's real name, the same commands, torchrun."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from projects import ROOT, outside_environment, write_project
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState, list_runs
from waiting import DEADLINE_S, wait_until


def environment() -> dict[str, str]:
    """As on a machine with the dependencies and without shoal: `jobs` must put it on the path."""
    return outside_environment(PYTHONPATH="", OMP_NUM_THREADS="1")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "project")


def run_python(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command,
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_help_names_the_recipe_and_loads_no_torch(project: Path) -> None:
    done = run_python(project, "-X", "importtime", "-m", "jobs.digits", "--help")
    assert done.returncode == 0, done.stderr
    assert "Digits: Handwritten digits" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "ray"} & loaded


def test_without_a_cluster_it_says_how_to_start_one(project: Path) -> None:
    done = run_python(project, "-m", "jobs.digits", "train")
    assert (done.returncode, done.stderr) == (
        2,
        "error: no cluster of this project runs; start it: shoal up\n",
    )


def test_the_recipe_goes_by_the_name_that_workers_can_import(project: Path) -> None:
    (project / "named.py").write_text(
        "import shoal\n"
        "class Mine(shoal.Recipe):\n"
        "    pass\n"
        "if __name__ == '__main__':\n"
        "    from shoal.cli.job import importable\n"
        "    print(Mine.__module__, importable(Mine).__module__, importable(Mine) is Mine)\n"
    )
    (project / "shoal").symlink_to(ROOT / "platform" / "shoal")
    done = run_python(project, "-m", "named")
    assert done.stdout == "__main__ named False\n", done.stderr
    # As a plain file it has no importable name: it travels by value, and trains.
    assert run_python(project, "named.py").stdout == "__main__ __main__ True\n"


def torchrun(project: Path, module: str, *words: str, path: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", module, "train", *words]
    return subprocess.Popen(
        command,
        cwd=project,
        env={**environment(), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def only_run(project: Path) -> RunRecord:
    found = list_runs(Storage(project / ".shoal"))
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_under_torchrun_it_trains_into_the_projects_storage_and_stops_gracefully(project: Path) -> None:
    process = torchrun(project, "jobs.digits", "hidden=16", "--steps=1000000")
    try:
        runs = Storage(project / ".shoal").runs_dir

        def has_begun() -> bool:
            assert process.poll() is None, process.communicate()[0]
            return any(runs.glob("*/journal.jsonl")) and only_run(project).step >= 10

        wait_until(has_begun, "the run takes ten steps")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    record = only_run(project)
    assert record.state() == RunState.STOPPED, out
    assert record.events(("start",))[-1]["workers"] == 2
    assert record.events(("checkpoint",))[-1]["step"] == record.step

    # The shell's command goes on with it, as the job's would.
    words = ("jobs.digits", "hidden=16", f"--steps={record.step + 50}")
    process = torchrun(project, "shoal.cli", *words, path=str(ROOT / "platform"))
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out
    assert record.state() == RunState.FINISHED
    assert record.events(("start",))[-1]["source"] == "checkpoint"
    assert re.search(r"^state +finished$", out, re.M)
