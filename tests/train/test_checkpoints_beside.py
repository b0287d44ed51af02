"""Large states are copied while the next step begins and written by a process: the same bytes as at once, here."""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.storage import Storage, verify
from shoal.storage.background import BackgroundWriter, WriterLost
from shoal.storage.owner import start_ticks
from shoal.tracking import RunRecord, RunState
from shoal.train import boundary, checkpoints
from shoal.train.engine import train_worker
from shoal.train.group import Group
from shoal.train.spec import RunSpec
from toy import Toy
from waiting import DEADLINE_S, wait_until


class Steady(Toy):
    """Never better than at its first look: so nothing but the clock asks for checkpoints."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"accuracy": torch.zeros(())}


def train(tmp_path: Path, recipe: shoal.Recipe | None = None, **changes: Any) -> RunRecord:
    spec = RunSpec(
        recipe=recipe or Steady(), name="run", storage=Storage(tmp_path), target_steps=60, keep=60,
        checkpoint_every_s=0.0, threads=1,
    )  # fmt: skip
    train_worker(replace(spec, **changes), Group.alone())
    return RunRecord(spec.storage, "run")


def contents(record: RunRecord) -> dict[str, dict[str, bytes]]:
    folders = sorted(record.checkpoints_dir.iterdir())
    for folder in folders:
        verify(folder)
    return {folder.name: {file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every state counts as large; the processes that were started. None of them may be left."""
    monkeypatch.setattr(checkpoints, "BACKGROUND_MIN_BYTES", 0)
    pids: list[int] = []
    start = BackgroundWriter.start

    def noted(self: BackgroundWriter) -> None:
        start(self)
        if self.pid is not None and self.pid not in pids:
            pids.append(self.pid)

    monkeypatch.setattr(BackgroundWriter, "start", noted)
    return pids


def test_checkpoints_are_byte_for_byte_those_that_are_written_at_once(
    tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = contents(train(tmp_path / "beside", Steady(eval_every=16), target_steps=16))
    monkeypatch.setattr(checkpoints, "BACKGROUND_MIN_BYTES", 2**60)
    every_step = train(tmp_path / "at once", Steady(eval_every=1), target_steps=16, checkpoint_at_eval=True)
    at_once = contents(every_step)
    assert len(beside) >= 2
    for step, files in beside.items():
        for name in ("model.safetensors", "rest.safetensors"):
            assert files[name] == at_once[step][name], (step, name)
    assert len(started) == 1, "one process wrote all"
    assert start_ticks(started[0]) is None


def test_a_copy_that_is_late_is_finished_before_the_optimizer_steps(
    tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a forward pass changes, BatchNorm's buffers, was copied before that."""
    complete = checkpoints.Snapshot.complete

    def late(snap: checkpoints.Snapshot) -> None:
        assert snap.staged is not None
        if snap.step < 400:  # no step follows the last
            assert snap.staged.copying._done.wait(DEADLINE_S), "the training thread finishes it"
        complete(snap)

    monkeypatch.setattr(checkpoints.Snapshot, "complete", late)
    record = train(tmp_path, Steady(eval_every=400), target_steps=400, keep=400)
    assert record.state() == RunState.FINISHED
    assert not record.events(("warning",)), "none was torn"
    assert len(contents(record)) > 2


def test_how_often_changes_no_bit(tmp_path: Path, started: list[int]) -> None:
    often, auto = (train(tmp_path / str(every_s), checkpoint_every_s=every_s) for every_s in (0.0, None))
    assert len(contents(often)) > len(contents(auto))
    last = max(contents(auto))
    assert last == max(contents(often))
    for name in ("model.safetensors", "rest.safetensors"):
        assert contents(often)[last][name] == contents(auto)[last][name]


def test_training_goes_on_while_one_is_written_and_no_second_is_begun(
    tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    far_on, begun = threading.Event(), []
    commit = BackgroundWriter.commit

    def slow(self: BackgroundWriter, *args: Any, **kwargs: Any) -> int:
        begun.append(kwargs["meta"]["step"])
        assert far_on.wait(DEADLINE_S)
        return commit(self, *args, **kwargs)

    class Watched(Steady):
        """Lets the first write end when the run is far on."""

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            if begun and (count.append(None) or len(count) == 30):
                assert len(begun) == 1
                far_on.set()
            return super().loss(model, batch)

    count: list[None] = []
    monkeypatch.setattr(BackgroundWriter, "commit", slow)
    record = train(tmp_path, Watched(eval_every=60))
    assert record.state() == RunState.FINISHED
    first, second, *_ = [event["step"] for event in record.checkpoints()]
    assert first == begun[0]
    assert second >= first + 25


def test_where_the_process_dies_the_step_is_saved_all_the_same(
    tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit, doomed = BackgroundWriter.commit, []

    def commit_and_die(self: BackgroundWriter, *args: Any, **kwargs: Any) -> int:
        if len(doomed) == 2:
            return commit(self, *args, **kwargs)
        self.start()
        pid = self.pid or 0
        doomed.append(pid)
        if len(doomed) == 2:  # when all is done, but for the answer
            commit(self, *args, **kwargs)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: start_ticks(pid) is None, "it is dead")
        raise WriterLost("the process died")

    monkeypatch.setattr(BackgroundWriter, "commit", commit_and_die)
    with caplog.at_level(logging.WARNING):
        record = train(tmp_path)
    assert record.state() == RunState.FINISHED
    assert len(caplog.records) == 2
    assert "is written by the training process: the process died" in caplog.text
    assert [Path(event["path"]).name for event in record.checkpoints()] == list(contents(record))
    assert set(doomed) <= set(started)
    assert all(start_ticks(pid) is None for pid in started)


def test_who_waits_for_a_process_that_gets_no_time_has_the_thread_write(
    tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []
    start = BackgroundWriter.start

    def start_stopped(self: BackgroundWriter) -> None:
        start(self)
        stopped.append(self.pid)
        os.kill(self.pid or 0, signal.SIGSTOP)

    monkeypatch.setattr(BackgroundWriter, "start", start_stopped)
    monkeypatch.setattr(boundary, "WRITE_SLICE_S", 0.01)
    record = train(tmp_path, Steady(eval_every=60))
    assert record.state() == RunState.FINISHED
    assert stopped
    assert contents(record).keys() == {Path(event["path"]).name for event in record.checkpoints()}
    assert record.checkpoints()[-1]["step"] == 60


def test_what_a_forward_pass_changes_is_no_torn_checkpoint(tmp_path: Path, started: list[int]) -> None:
    class Wild(Steady):
        """Changes a parameter in its forward pass, as nobody should: after the copy began."""

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)  # type: ignore[index, operator, union-attr]
            return super().loss(model, batch)

    copying = checkpoints.Snapshot.complete
    looked = threading.Event()

    def late(snap: checkpoints.Snapshot) -> None:
        looked.wait(0.02)  # so that the forward pass comes first
        copying(snap)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints.Snapshot, "complete", late)
        record = train(tmp_path, Wild())
    assert record.state() == RunState.FINISHED
    warnings = [event["message"] for event in record.events(("warning",))]
    assert len(warnings) == 1, "once noticed, copies are made before the next batch"
    assert "changed outside of session.step()" in warnings[0]
    assert len(contents(record)) > 2


def test_weights_that_became_nan_end_the_run_and_are_not_saved(tmp_path: Path, started: list[int]) -> None:
    class Breaking(Steady):
        """One parameter, which no loss sees, turns NaN."""

        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.unseen = nn.Parameter(torch.zeros(3))
            return model

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            count.append(None)
            harmful = torch.where(torch.tensor(len(count) > 30), torch.nan, 0.0)
            return super().loss(model, batch) + (model.unseen * harmful).nansum()  # type: ignore[operator]

    count: list[None] = []
    record = train(tmp_path, Breaking(eval_every=60))
    assert record.state() == RunState.FAILED
    assert "unseen is NaN or infinite, so nothing was saved" in record.events(("end",))[-1]["error"]
    assert all(torch.isfinite(t).all() for c in record.checkpoints_dir.iterdir() for t in
               checkpoints.read_checkpoint(c).model.values())  # fmt: skip
