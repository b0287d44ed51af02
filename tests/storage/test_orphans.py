"""Whose unfinished files may be deleted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from storage_faults import commit_content, start_child, wait_child

from shoal.storage import collect_orphans
from shoal.storage.owner import FOREIGN_AFTER_S, Owner, temporary_path


def unfinished(parent: Path, **changes: object) -> Path:
    """A temporary directory as the given owner would have left it."""
    owner = {**vars(Owner.here()), **changes}
    tag = f"{owner['machine']}-{owner['boot']}-{owner['pid']}-{owner['started']}-0123abcd"
    path = parent / f".step.{tag}.tmp"
    path.mkdir()
    (path / "data").write_bytes(b"1")
    return path


def test_unfinished_work_of_a_living_process_stays(tmp_path: Path) -> None:
    temporary_path(tmp_path / "mine").mkdir()
    unfinished(tmp_path)
    assert collect_orphans(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_a_process_with_the_same_pid_is_another_process(tmp_path: Path) -> None:
    path = unfinished(tmp_path, started=Owner.here().started - 1)
    assert collect_orphans(tmp_path) == [path]


def test_a_reboot_ends_all_processes(tmp_path: Path) -> None:
    path = unfinished(tmp_path, boot="00000000")
    assert collect_orphans(tmp_path) == [path]


def test_a_killed_process_is_gone_before_it_is_reaped(tmp_path: Path) -> None:
    def begin() -> None:
        temporary_path(tmp_path / "target").mkdir()
        os.write(writer, b"1")
        signal.pause()

    reader, writer = os.pipe()
    pid = start_child(begin)
    os.read(reader, 1)
    assert collect_orphans(tmp_path) == []
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
    assert len(collect_orphans(tmp_path)) == 1
    wait_child(pid)


@pytest.mark.parametrize("age_s", [0.0, FOREIGN_AFTER_S - 60, FOREIGN_AFTER_S + 60])
def test_another_machines_work_goes_only_after_a_day_without_change(tmp_path: Path, age_s: float) -> None:
    path = unfinished(tmp_path, machine="00000000")
    os.utime(path / "data", times=(time.time() - age_s,) * 2)
    os.utime(path, times=(time.time() - 2 * FOREIGN_AFTER_S,) * 2)
    assert collect_orphans(tmp_path) == ([path] if age_s > FOREIGN_AFTER_S else [])


def test_nothing_else_is_ever_deleted(tmp_path: Path) -> None:
    commit_content(tmp_path / "step-1")
    dead = f"{Owner.here().machine}-00000000-1-1-0123abcd"
    for name in (f"step.{dead}.tmp", f".step.{dead}.txt", f".step.{dead}", ".hidden", "a.tmp"):
        (tmp_path / name).mkdir()
    assert collect_orphans(tmp_path) == []
    assert collect_orphans(tmp_path / "nowhere") == []


def test_a_link_that_poses_as_an_orphan_does_not_reach_its_target(tmp_path: Path) -> None:
    commit_content(tmp_path / "kept")
    link = tmp_path / f".step.{Owner.here().machine}-00000000-1-1-0123abcd.tmp"
    link.symlink_to(tmp_path / "kept")
    assert collect_orphans(tmp_path) == [link]
    assert (tmp_path / "kept" / "weights.bin").exists()
