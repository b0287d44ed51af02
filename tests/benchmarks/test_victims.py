"""What the recovery benchmark sees from outside: processes that note steps, one of which is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from benchmarks.steps import completed, read
from benchmarks.victims import Victims, has_ceased
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys
from benchmarks.steps import completed
folder, rank, first, last = sys.argv[1], *map(int, sys.argv[2:])
for step in range(first, last + 1):
    completed(folder, rank, step)
sys.stdin.read()
"""


def start(folder: Path, rank: int, first: int, last: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RANK, str(folder), str(rank), str(first), str(last)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)


def test_a_killed_rank_costs_the_steps_that_all_had_and_that_its_successor_does_again(tmp_path: Path) -> None:
    completed(str(tmp_path), 0, 9)  # the survivor is one step behind: the tenth is not lost
    first = start(tmp_path, 1, 1, 10)
    wait_until(lambda: (steps := read(tmp_path, 1)) and steps.last == 10, "ten steps of rank 1")

    def restart() -> subprocess.Popen[bytes]:
        first.wait()
        return start(tmp_path, 1, 7, 8)

    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(restart)
        recovery = Victims(tmp_path).harm(1, signal.SIGKILL, 60.0)
    second.result().communicate()
    found = read(tmp_path, 1)
    assert recovery is not None
    assert found is not None
    assert first.returncode == -signal.SIGKILL
    assert recovery.steps_lost == 3  # 7, 8 and 9
    assert (found.pid, found.first, found.last) == (second.result().pid, 7, 8)
    assert 0 < recovery.seconds < 60


def test_a_stopped_rank_that_nobody_replaces_is_none(tmp_path: Path) -> None:
    completed(str(tmp_path), 0, 1)
    process = start(tmp_path, 1, 1, 1)
    wait_until(lambda: read(tmp_path, 1), "a step of rank 1")
    try:
        assert Victims(tmp_path).harm(1, signal.SIGSTOP, 0.0) is None
        assert has_ceased(psutil.Process(process.pid))
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_becomes_another_rank_leaves_the_file_of_the_first_to_its_successor(
    tmp_path: Path,
) -> None:
    completed(str(tmp_path), 0, 5)
    completed(str(tmp_path), 1, 6)
    start(tmp_path, 0, 7, 7).communicate()
    completed(str(tmp_path), 1, 8)
    ranks = [read(tmp_path, 0), read(tmp_path, 1)]
    assert [steps and (steps.first, steps.last) for steps in ranks] == [(7, 7), (6, 8)]


def test_there_is_progress_once_every_rank_has_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.victims.START_DEADLINE_S", 0.0)
    monkeypatch.setattr("benchmarks.victims.PROGRESS_S", 0.0)
    start(tmp_path, 0, 1, 400).communicate()
    victims = Victims(tmp_path)
    with pytest.raises(SystemExit, match="no progress"):
        victims.wait_for_progress()  # rank 1 has not even begun
    start(tmp_path, 1, 1, 300).communicate()
    with pytest.raises(SystemExit, match="no progress"):
        victims.wait_for_progress()
    start(tmp_path, 1, 1, 301).communicate()
    victims.wait_for_progress()
