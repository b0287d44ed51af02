"""A trial on several workers, whose driver and journal are played by the test. No cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from searched import Line

from shoal.errors import StorageError, WorkerLost
from shoal.storage import Storage
from shoal.tracking import RunRecord
from shoal.train.spec import RunSpec
from shoal.tune import trial_on_workers
from shoal.tune.trial import Report
from shoal.tune.trial_on_workers import TrialOnWorkers


class PlayedDriver:
    """Is alive until the test says otherwise."""

    def __init__(self, record: RunRecord, *, obeys: bool = True) -> None:
        self._record, self._obeys = record, obeys
        self._begin = record.end_offset
        self.alive = True
        self.error: BaseException | None = None

    def is_alive(self) -> bool:
        return self.alive

    def failure(self) -> BaseException | None:
        return self.error

    def waits_for(self) -> str:
        return "nothing"

    def begin(self) -> int:
        return self._begin

    def stop(self) -> None:
        self._record.mark_stop()
        self.alive = not self._obeys

    def abort(self) -> None:
        self.alive = False


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    return RunSpec(recipe=Line(), name="s-t001", storage=Storage(tmp_path), target_steps=40)


@pytest.fixture
def record(spec: RunSpec) -> RunRecord:
    record = RunRecord(spec.storage, spec.name)
    record.claim_identity(spec.identity())
    return record


def measure(record: RunRecord, *steps: int, split: str = "val") -> None:
    for step in steps:
        record.append("eval", step=step, split=split, values={"error": 1.0 / step})


def evaluation(step: int) -> Report:
    return Report(step=step, value=1.0 / step, has_ended=False)


def end(record: RunRecord, step: int, state: str) -> Report:
    record.append("end", step=step, state=state, error="", error_type="", traceback="")
    return Report(step=step, value=1.0 / step, has_ended=True)


def test_each_evaluation_is_reported_once_and_the_last_with_the_end(spec: RunSpec, record: RunRecord) -> None:
    measure(record, 10)  # of an attempt before this one
    driver = PlayedDriver(record)
    trial = TrialOnWorkers(spec, driver)
    measure(record, 20, 30)
    measure(record, 35, split="test")
    assert [trial.next(), trial.next()] == [evaluation(20), evaluation(30)]
    measure(record, 30, 40)  # the workers started again at step 20
    last = end(record, 40, "finished")
    driver.alive = False
    assert trial.next() == last


def test_what_a_driver_wrote_before_it_was_gone_is_not_missed(spec: RunSpec, record: RunRecord) -> None:
    class Ends(PlayedDriver):
        def is_alive(self) -> bool:
            if self.alive:
                measure(record, 10)
            self.alive = False
            return self.alive

    trial = TrialOnWorkers(spec, Ends(record))
    assert trial.next() == evaluation(10)
    assert trial.next().has_ended


def test_a_stopped_trial_ends_at_a_step_boundary(spec: RunSpec, record: RunRecord) -> None:
    driver = PlayedDriver(record)
    trial = TrialOnWorkers(spec, driver)
    assert trial.stop()
    assert not record.stop_requested()  # whoever goes on with the run by its name is not stopped again
    record.mark_stop()
    assert trial.stop()
    assert record.stop_requested()  # it had ended before: this request is somebody else's


def test_workers_that_do_not_stop_are_killed(
    spec: RunSpec, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_on_workers, "STOP_TIMEOUT_S", 0.0)
    driver = PlayedDriver(record, obeys=False)
    assert TrialOnWorkers(spec, driver).stop()
    assert not driver.alive


def test_a_machine_failure_is_tried_again_but_not_restarts_that_are_used_up(
    spec: RunSpec, record: RunRecord
) -> None:
    driver = PlayedDriver(record)
    trial = TrialOnWorkers(spec, driver)
    measure(record, 10)
    last = end(record, 10, "failed")
    driver.alive = False
    driver.error = StorageError("the disk is gone")
    assert trial.next() == evaluation(10)
    with pytest.raises(StorageError, match="the disk is gone"):
        trial.next()
    driver.error = WorkerLost("four times")
    assert trial.next() == last
