"""A full disk: training goes on, what is said waits, what was committed stays, and the end is told."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.errors import StorageError
from shoal.storage import Storage, disk, journal, verify
from shoal.storage.disk import is_full
from shoal.tracking import RunRecord, RunState
from shoal.train import checkpoints, patient_record
from shoal.train.engine import train_worker
from shoal.train.group import Group
from shoal.train.output import captured_output
from shoal.train.patient_record import MAX_WAITING, PatientRecord
from shoal.train.spec import RunSpec
from toy import Toy
from waiting import wait_until


class Room:
    """What the disk has left: every write that goes through `patch` asks it first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full: Callable[[str], bool] = lambda what: False
        self.asked: list[str] = []
        self._patch = monkeypatch
        for name in ("make_directory", "write_file"):
            self._guard(disk.Disk, name, name)
        self._guard(journal, "_open", "line")
        self._guard(checkpoints, "save_tensors", "tensors")

    def _guard(self, owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def asking(*args: Any, **kwargs: Any) -> Any:
            self.asked.append(what)
            if self.is_full(what):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        self._patch.setattr(owner, name, asking)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(monkeypatch)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def record(tmp_path: Path) -> PatientRecord:
    record = PatientRecord(Storage(tmp_path), "run", now=Clock())
    record.append("start", step=0)
    return record


def tick(record: PatientRecord) -> None:
    record._now.now += patient_record.RETRY_S  # type: ignore[attr-defined]


def lines_of(record: RunRecord) -> list[tuple[str, Any]]:
    return [(event["kind"], event.get("step", event.get("is_over"))) for event in record.events()]


def test_lines_wait_for_room_in_their_order(record: PatientRecord, room: Room) -> None:
    reserve = record.dir / "reserve"
    with record.reserving(is_mine=True):
        assert reserve.stat().st_size == patient_record.RESERVE_BYTES
        room.is_full = lambda what: reserve.exists()  # until the reserve is given up
        record.append("metrics", step=1, values={})
        assert lines_of(record)[1:] == [("disk_full", False)]
        assert "No space left" in record.events()[-1]["message"]
        room.is_full = lambda what: True
        for step in range(2, MAX_WAITING + 11):
            record.append("metrics", step=step, values={})
        record.append("start", step=7)
        assert record.attempt == 2
        tick(record)
        record.append("eval", step=7, split="val", values={})
        assert len(record.events()) == 2
        assert not reserve.exists()
        room.is_full = lambda what: False
        record.append("eval", step=8, split="val", values={})
        assert len(record.events()) == 2, "it is not tried at every line"
        tick(record)
        record.append("eval", step=9, split="val", values={})
        assert reserve.exists()
    assert not reserve.exists()
    found = lines_of(record)
    assert found[2 : 2 + MAX_WAITING] == [
        *[("metrics", step) for step in range(14, MAX_WAITING + 11)],
        ("start", 7), ("eval", 7), ("eval", 8),
    ]  # fmt: skip
    assert found[2 + MAX_WAITING :] == [("disk_full", True), ("eval", 9)]
    assert "13 lines of metrics were dropped" in record.events()[-2]["message"]


def test_the_last_line_fits_into_the_reserve(record: PatientRecord, room: Room) -> None:
    with record.reserving(is_mine=True):
        room.is_full = lambda what: True
        record.append("metrics", step=1, values={})
        record.append("eval", step=1, split="val", values={})
        room.is_full = lambda what: (record.dir / "reserve").exists()
        record.append_end(RunState.FINISHED, step=1)
    assert lines_of(record)[-1] == ("end", 1)
    assert record.state() is RunState.FINISHED


def test_no_room_for_the_last_line_is_an_error(record: PatientRecord, room: Room) -> None:
    room.is_full = lambda what: True
    with pytest.raises(StorageError, match="No space left"):
        record.append_end(RunState.FINISHED, step=1)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_another_failure_of_the_disk_is_not_waited_out(
    record: PatientRecord, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(journal, "_open", fail)
    with pytest.raises(StorageError):
        record.append("metrics", step=1, values={})


def test_what_counts_as_full() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        error = StorageError("cannot commit")
        error.__cause__ = OSError(number, "x")
        assert is_full(error)
    assert not is_full(OSError(errno.EIO, "x"))
    assert not is_full(None)


def test_prints_are_dropped_and_nothing_else_happens() -> None:
    with captured_output(Path("/dev/full")):
        print("x" * 100_000)
        print("more", file=sys.stderr)


def spec_of(storage: Path, recipe: shoal.Recipe, steps: int = 12) -> RunSpec:
    return RunSpec(recipe=recipe, name="run", storage=Storage(storage), target_steps=steps, keep=1)


def test_no_write_that_fails_once_costs_the_run_more_than_itself(tmp_path: Path, room: Room) -> None:
    recipe = Toy(eval_every=2)
    train_worker(spec_of(tmp_path / "whole", recipe, 4), Group.alone())
    writes = list(room.asked)
    began = writes.index("line")  # from the start line on
    last_save = len(writes) - 1 - writes[::-1].index("make_directory")
    assert len(writes) - began > 15
    for failing in range(began, len(writes)):
        room.asked.clear()
        room.is_full = lambda what, failing=failing: len(room.asked) - 1 == failing  # type: ignore[misc]
        storage = tmp_path / str(failing)
        train_worker(spec_of(storage, recipe, 4), Group.alone())
        record = RunRecord(Storage(storage), "run")
        is_last_save = failing >= last_save and writes[failing] != "line"
        end = record.events(("end",))[-1]
        assert record.state() is (RunState.FAILED if is_last_save else RunState.FINISHED), (failing, end)
        if is_last_save:
            assert end["error_type"] == "StorageError"
            assert "its last checkpoint could not be saved" in end["error"]
        assert [event["step"] for event in record.events(("eval",))] == [2, 4]
        if failing < len(writes) - 1:  # the last line goes into the reserve without further ado
            assert record.events(("disk_full",))[0]["is_over"] is False
        kept = sorted((record.dir / "checkpoints").iterdir())
        assert kept, failing
        for checkpoint in kept:
            verify(checkpoint)
        assert not (record.dir / "reserve").exists()


class Filling(Toy):
    """Fills its own disk in step 3; makes room in step ``frees`` again."""

    frees: int = 10**6

    def train(self, session: shoal.Session) -> None:
        filler = Path(sys.argv[1]) / "filler"
        for batch in session.batches():
            if session.steps_done == 3:
                wait_until(
                    lambda: any(Path(sys.argv[1]).glob("runs/*/checkpoints/step-*")),
                    "the checkpoint of step 2 is on the disk",
                )
                with suppress(OSError), open(filler, "wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            if session.steps_done == self.frees:
                filler.unlink()
            print("noise " * 1000)
            session.backward(session.loss(batch))
            session.step()


def train_on_a_small_disk() -> None:
    """What the process of `test_a_real_disk_that_is_full` does, within its own mount of 2 MiB."""
    storage, frees = Path(sys.argv[1]), int(sys.argv[2])
    patient_record.RETRY_S = 0.0
    spec = spec_of(storage, Filling(eval_every=2, frees=frees))
    with captured_output(storage / "log"):
        train_worker(spec, Group.alone())
    record = RunRecord(spec.storage, "run")
    verified = [verify(path).meta["step"] for path in sorted(record.checkpoints_dir.iterdir())]
    end = record.events(("end",))[-1]
    assert record.events(("disk_full",))[0]["is_over"] is False
    if frees > 100:
        assert verified == [2], verified
        assert end["state"] == "failed", end
        assert "its last checkpoint could not be saved" in end["error"], end
    else:
        assert verified[-1] == 12, verified
        assert end["state"] == "finished", end
        assert [e["step"] for e in record.events(("metrics",))] == list(range(1, 13))
        assert record.events(("disk_full",))[-1]["is_over"] is True
    print("survived")


@pytest.mark.parametrize("frees", [8, 1000])
def test_a_real_disk_that_is_full(tmp_path: Path, frees: int) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    # $0 is the mount point; 77 says that this machine does not let us mount.
    script = 'mount -t tmpfs -o size=2m none "$0" || exit 77; exec "$@"'
    program = [sys.executable, __file__, str(tmp_path), str(frees)]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(tmp_path), *program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip("may not mount here")
    assert (result.stdout, result.returncode) == ("survived\n", 0), result.stderr


if __name__ == "__main__":
    train_on_a_small_disk()
