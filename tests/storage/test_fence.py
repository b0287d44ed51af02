"""Two who both believe that they are the one who writes: the older stops, wherever it was when it fell asleep."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from storage_faults import SteppedDisk, dying_disk, failing_disk, in_child, num_steps, start_child, wait_child

from shoal.errors import StorageError, SupersededError
from shoal.storage import NO_TOKEN, Disk, DiskStore, Fence, Succession, Token, collect_orphans, commit, verify
from shoal.train.stamp import checkpoint_folders, checkpoint_path, counting, position_of

SUPERSEDED = 42


def write_step(checkpoints: Path, step: int, token: Token, disk: Disk | None = None) -> Path:
    target = checkpoint_path(checkpoints, step, token.number)

    def write(folder: Path) -> None:
        (folder / "weights").write_text(f"{step} of {token.number}")

    commit(target, write, meta={"token": token.number}, guard=token.check, disk=disk or Disk())
    return target


def begin(fence: Fence, checkpoints: Path, token: Token) -> Path | None:
    """As a run does: go on from the newest that counts."""
    succession = fence.succession()
    newest = max(counting(checkpoints, succession), default=None)
    at = None if newest is None else position_of(newest)
    token.begin(succession.up_to(at, map(position_of, checkpoint_folders(checkpoints))))
    return newest


def stopping_disk(at: int) -> SteppedDisk:
    """A disk that stops its process (SIGSTOP) before call ``at``."""

    def stop(current: int, name: str) -> None:
        if current == at:
            os.kill(os.getpid(), signal.SIGSTOP)

    return SteppedDisk(stop)


def commit_asleep(checkpoints: Path, token: Token, at: int) -> None:
    """The old driver: it commits step 20, and sleeps before call ``at`` of it."""
    try:
        write_step(checkpoints, 20, token, stopping_disk(at))
    except SupersededError:
        os._exit(SUPERSEDED)


def until_stopped(pid: int) -> None:
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status


CALLS = ["make_directory", "sync_file", "write_file", "sync_directory", "publish_directory", "sync_directory"]
"""Of `Disk`, in a commit of one file; the token is checked before the last but one, and after the last."""


def test_a_commit_makes_the_calls_that_are_tried(tmp_path: Path) -> None:
    disk = SteppedDisk(lambda number, name: None)
    write_step(tmp_path, 20, Fence(DiskStore(tmp_path / "fence")).take(), disk)
    assert disk.steps == CALLS


@pytest.mark.parametrize("wakes", ["taken", "looked", "begun", "committed"])
@pytest.mark.parametrize("call", range(len(CALLS)))
def test_of_an_old_driver_that_wakes_nothing_is_read(tmp_path: Path, call: int, wakes: str) -> None:
    """It sleeps before each call of its commit, and wakes when the next driver has come so far."""
    fence, checkpoints = Fence(DiskStore(tmp_path / "fence")), tmp_path / "checkpoints"
    old = fence.take()
    begin(fence, checkpoints, old)
    write_step(checkpoints, 10, old)
    pid = start_child(partial(commit_asleep, checkpoints, old, call))
    until_stopped(pid)

    def wake(when: str) -> None:
        if when == wakes:
            os.kill(pid, signal.SIGCONT)
            assert wait_child(pid) == SUPERSEDED, "the old one says that it was superseded"

    new = fence.take()
    wake("taken")
    succession = fence.succession()
    seen = counting(checkpoints, succession)
    wake("looked")
    new.begin(succession.up_to(position_of(seen[-1]), map(position_of, checkpoint_folders(checkpoints))))
    wake("begun")
    mine = write_step(checkpoints, 30, new)
    wake("committed")

    assert counting(checkpoints, fence.succession()) == [*seen, mine], (
        "what the new one saw, and what it wrote"
    )
    assert [verify(path).meta["token"] for path in seen] == [old.number] * len(seen)
    # It had renamed when the new one looked: then that one went on from it, and no step was lost.
    had_renamed = call == 5 or (call, wakes) == (4, "taken")
    assert [position_of(path)[0] for path in seen] == ([10, 20] if had_renamed else [10])
    with pytest.raises(SupersededError, match=r"has taken over .* \(token 2; this one has 1\)"):
        write_step(checkpoints, 40, old)
    assert collect_orphans(checkpoints) == []


def test_only_one_of_many_takes_a_token(tmp_path: Path) -> None:
    fence, taken = Fence(DiskStore(tmp_path / "fence")), []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait(30)
        taken.append(fence.take().number)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(taken)) == len(taken) == 8


def test_attempts_of_one_driver_supersede_each_other_and_never_a_later_driver(tmp_path: Path) -> None:
    fence = Fence(DiskStore(tmp_path / "fence"))
    first = fence.take()
    attempts = [fence.take(driver=first.number) for _ in range(2)]
    with pytest.raises(SupersededError):
        attempts[0].check()
    attempts[1].check()
    first.check_driver()
    attempts[1].begin({})
    first.check_driver()
    later = fence.take()
    for refused in (first.check_driver, attempts[1].check, lambda: fence.take(driver=first.number)):
        with pytest.raises(SupersededError):
            refused()
    fence.take(driver=later.number).check()
    pickle.loads(pickle.dumps(later)).check_driver()


def test_a_slow_one_does_not_win_with_a_number_that_was_taken_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read that 1 was the newest; until it creates 2, others have taken 2 and 3, and 2 is gone."""
    fence = Fence(DiskStore(tmp_path / "fence"))
    fence.take()

    class Overtaken(Disk):
        def publish_file(self, source: Path, target: Path) -> None:
            if target.name == "000002.json" and not target.with_name("000003.json").exists():
                fence.take()
                fence.take().begin({})
            super().publish_file(source, target)

    assert Fence(DiskStore(tmp_path / "fence", Overtaken())).take().number == 4
    assert fence.store.list() == ["000003.json", "000004.json"]


def test_which_older_commits_count_is_known_over_many_holders(tmp_path: Path) -> None:
    fence, checkpoints = Fence(DiskStore(tmp_path / "fence")), tmp_path / "checkpoints"
    kept: list[Path] = []
    olds = []
    for step in (10, 20, 30):
        token = fence.take()
        assert begin(fence, checkpoints, token) == (kept[-1] if kept else None)
        kept.append(write_step(checkpoints, step, token))
        olds.append(token)
    # What their processes manage to rename is written without the checks here.
    for step, token in ((15, olds[0]), (20, olds[0]), (25, olds[1]), (40, olds[1])):
        target = checkpoint_path(checkpoints, step, token.number)
        commit(target, lambda folder: None, meta={"token": token.number})
    assert counting(checkpoints, fence.succession()) == kept
    # One that is damaged is gone back behind: what was committed after it does not count, and it neither.
    last = fence.take()
    older = fence.succession().up_to((20, 2), map(position_of, checkpoint_folders(checkpoints)))
    last.begin(older)
    assert counting(checkpoints, fence.succession()) == kept[:2]
    assert fence.store.list() == ["000004.json"], "the newest holder's is enough"


def test_who_begins_anew_leaves_nothing_of_before(tmp_path: Path) -> None:
    assert Succession().counts(5, NO_TOKEN), "where nobody ever took a token, all count"
    fence = Fence(DiskStore(tmp_path / "fence"))
    fence.take().begin(Succession().up_to(None, [(5, NO_TOKEN), (7, NO_TOKEN)]))
    assert not fence.succession().counts(5, NO_TOKEN)
    assert fence.succession().counts(0, 1)


def test_a_copy_without_its_fence_goes_on_above_its_tokens(tmp_path: Path) -> None:
    fence = Fence(DiskStore(tmp_path / "fence"))
    assert fence.take(above=7).number == 8
    assert fence.take(above=7).number == 9


@pytest.mark.parametrize("act", ["take", "begin"])
def test_whatever_fails_and_whenever_it_dies_the_fence_can_be_used(tmp_path: Path, act: str) -> None:
    def do(folder: Path, disk: Disk) -> None:
        store = DiskStore(folder, disk)
        if act == "take":
            Fence(store).take()
        else:
            replace(Fence(DiskStore(folder)).take(), fence=store).begin({0: 10})

    counted = tmp_path / "counted"
    Fence(DiskStore(counted)).take().begin({0: 10})
    for step in range(num_steps(lambda disk: do(counted, disk))):
        for kind in (failing_disk, dying_disk):
            folder = tmp_path / f"{act}-{step}-{kind.__name__}"
            fence = Fence(DiskStore(folder))
            fence.take().begin({0: 10})
            if kind is failing_disk:
                with contextlib.suppress(StorageError):  # a temporary file that stays is only logged
                    do(folder, kind(step))
            else:
                assert in_child(partial(do, folder, kind(step))) == -signal.SIGKILL
            assert fence.succession().counts(10, 0)
            assert not fence.succession().counts(11, 0)
            token = fence.take()
            token.begin({0: 5})
            assert fence.succession() == Succession(token.number, {0: 5})
            if kind is dying_disk:
                collect_orphans(folder)
                assert os.listdir(folder) == [f"{token.number:06d}.json"]


def damage_bit(content: bytes) -> bytes:
    return content.replace(b'"0": 10', b'"0": 11')


@pytest.mark.parametrize("damage", [damage_bit, lambda content: content[:-9], lambda content: b"[]"])
def test_a_damaged_file_makes_no_run_unusable(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    fence = Fence(DiskStore(tmp_path / "fence"))
    fence.take().begin({0: 10})
    (file,) = (tmp_path / "fence").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert fence.succession() == Succession(), "what counted before it counts: all"
    token = fence.take()
    assert token.number == 2
    token.begin({0: 10})
    assert fence.succession() == Succession(2, {0: 10})


def test_a_name_that_is_no_tokens_is_none(tmp_path: Path) -> None:
    fence = Fence(DiskStore(tmp_path / "fence"))
    fence.take()
    for name in ("000009.json.bak", ".000009.json.tmp", "9.json"):
        (tmp_path / "fence" / name).write_text(json.dumps({}))
    assert fence.take().number == 2
