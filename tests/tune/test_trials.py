"""A sweep's bookkeeping, and one trial in this process. No cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from searched import Line

from shoal.errors import CorruptError, IdentityError, NotFoundError, RequestError, StorageError
from shoal.recipe import minimize
from shoal.storage import Storage, append_line
from shoal.tracking import RunRecord, RunState
from shoal.train.spec import EvalListener, RunSpec
from shoal.tune.record import SweepRecord, Trial, TrialState, run_of
from shoal.tune.search import Search
from shoal.tune.space import loguniform
from shoal.tune.sweep import Sweep, SweepDriver, best_of, open_sweep
from shoal.tune.trial import TrialPlan, TrialRun, train_here
from shoal.tune.trials import HOPELESS_AFTER, Trials

SPACE = {"lr": loguniform(1e-3, 1e-1)}
IDENTITY = {
    "recipe": "searched:Line",
    "space": {"lr": {"uniform": [1e-3, 1e-1], "log": True}},
    "objective": {"metric": "error", "mode": "min"},
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def make_plan(storage: Storage, recipe: Line | None = None, *, steps: int = 40) -> TrialPlan:
    template = RunSpec(recipe=recipe or Line(), name="s", storage=storage, target_steps=steps, threads=1)
    return TrialPlan(sweep="s", template=template)


def make_trials(storage: Storage, num_trials: int = 3, recipe: Line | None = None) -> Trials:
    record = SweepRecord(storage, "s")
    record.claim(IDENTITY)
    plan = make_plan(storage, recipe)
    return Trials(record, plan, Search(SPACE, Line.objective, seed=0), num_trials=num_trials)


def train(storage: Storage, trial: Trial, *, steps: int = 40) -> list[int]:
    """Train a trial here to its end; returns the steps it reported."""
    run = TrialRun(make_plan(storage, steps=steps).spec(trial.number, trial.fields))
    steps_seen = []
    while not (report := run.next()).has_ended:
        steps_seen.append(report.step)
    return [*steps_seen, report.step]


def die_at_step_30(step: int, values: Mapping[str, float]) -> None:
    if step == 30:  # by then the checkpoint of step 10 is committed for certain
        raise StorageError("the machine died")


def test_a_trial_reports_each_evaluation_and_its_end(storage: Storage) -> None:
    trial = make_trials(storage).next()
    assert trial is not None
    assert train(storage, trial) == [10, 20, 30, 40]
    assert RunRecord(storage, trial.run).state() is RunState.FINISHED


def test_a_trial_that_is_stopped_commits_and_says_so(storage: Storage) -> None:
    trial = make_trials(storage).next()
    assert trial is not None
    run = TrialRun(make_plan(storage, steps=100_000).spec(1, trial.fields))
    assert run.next().step == 10
    assert run.stop()
    record = RunRecord(storage, trial.run)
    assert record.state() is RunState.STOPPED
    assert record.events(("checkpoint",))[-1]["step"] == record.step
    assert 10 < record.step < 100_000
    assert not record.stop_requested()  # whoever goes on with the run by its name is not stopped again


def test_a_machine_failure_reaches_the_caller(storage: Storage) -> None:
    def fail(spec: RunSpec, on_eval: EvalListener) -> None:
        raise StorageError("the disk is gone")

    with pytest.raises(StorageError, match="the disk is gone"):
        TrialRun(make_plan(storage).spec(1, {}), train=fail).next()


def test_trials_are_runs_in_the_record(storage: Storage) -> None:
    trials = make_trials(storage)
    trial = trials.next()
    assert trial is not None
    assert trial.run == "s-t001"
    run = RunRecord(storage, trial.run)
    assert run.identity() == make_plan(storage).spec(1, trial.fields).identity()
    train(storage, trial)
    booked = trials.ended(1)
    best = run.best(minimize("error"))
    assert best is not None
    assert booked.state is TrialState.FINISHED
    assert (booked.value, booked.values, booked.step) == (best["values"]["error"], best["values"], 40)
    assert SweepRecord(storage, "s").trials() == [booked]


def test_results_that_only_the_journals_know_are_not_lost(storage: Storage) -> None:
    """The driver dies after trial 1 finished and before it booked that; trial 2 was half way."""
    trials = make_trials(storage)
    first, second = trials.next(), trials.next()
    assert first is not None
    assert second is not None
    train(storage, first)
    with pytest.raises(StorageError):
        train_here(make_plan(storage).spec(2, second.fields), die_at_step_30)

    resumed = make_trials(storage)
    assert [trial.state for trial in resumed.snapshot()] == [TrialState.FINISHED, TrialState.STOPPED]
    assert resumed.num_left == 2
    again = resumed.next()
    assert again is not None
    assert (again.number, again.run, again.fields) == (
        2,
        second.run,
        second.fields,
    )  # the unfinished one first
    train(storage, again)
    assert RunRecord(storage, again.run).events(("start",))[-1]["source"] == "checkpoint"
    resumed.ended(2)
    third = resumed.next()
    assert third is not None
    assert third.number == 3
    assert third.fields not in (first.fields, second.fields)
    assert resumed.next() is None


def test_more_trials_may_be_asked_for(storage: Storage) -> None:
    trials = make_trials(storage, 1)
    trial = trials.next()
    assert trial is not None
    train(storage, trial)
    trials.ended(1)
    assert trials.next() is None
    more = make_trials(storage, 2)
    assert more.num_left == 1
    assert (more.next() or trial).number == 2


def test_a_pruned_trial_keeps_what_it_measured(storage: Storage) -> None:
    trials = make_trials(storage)
    trial = trials.next()
    assert trial is not None
    run = TrialRun(make_plan(storage).spec(1, trial.fields))
    report = run.next()
    trials.started(1)
    trials.reported(1, report.step, report.value)
    pruned = trials.ended(1, was_pruned=True)
    run.stop()
    assert (pruned.state, pruned.step, pruned.value) == (TrialState.PRUNED, 10, report.value)
    assert make_trials(storage).snapshot() == [pruned]  # final: not looked at again


def test_a_recipe_that_always_fails_is_not_tried_to_the_end(storage: Storage) -> None:
    trials = make_trials(storage, 16, Line(kind="broken"))
    plan = make_plan(storage, Line(kind="broken"))
    for _ in range(HOPELESS_AFTER):
        trial = trials.next()
        assert trial is not None
        report = TrialRun(plan.spec(trial.number, trial.fields)).next()
        assert report.has_ended
        assert report.value is None
        assert trials.ended(trial.number).state is TrialState.FAILED
    assert trials.next() is None
    assert "this model cannot be built" in trials.snapshot()[0].error


def test_failures_end_nothing_while_a_trial_that_runs_may_do_better(storage: Storage) -> None:
    trials = make_trials(storage, 16, Line(kind="broken"))
    plan = make_plan(storage, Line(kind="broken"))
    assert trials.next() is not None
    trials.started(1)
    for number in range(2, 2 + HOPELESS_AFTER + 1):
        trial = trials.next()
        assert trial is not None, f"given up after {number - 2} failures"
        TrialRun(plan.spec(trial.number, trial.fields)).next()
        trials.ended(trial.number)
    assert trials.next() is None


def test_stop_hands_out_no_more_and_marks_what_runs(storage: Storage) -> None:
    trials = make_trials(storage)
    trial = trials.next()
    assert trial is not None
    trials.started(1)
    trials.stop()
    assert trials.next() is None
    assert RunRecord(storage, trial.run).stop_requested()
    assert trials.has_running
    trials.close()
    assert trials.snapshot()[0].state is TrialState.STOPPED
    assert not trials.has_running


def test_a_name_belongs_to_one_search(storage: Storage) -> None:
    record = SweepRecord(storage, "s")
    assert record.claim(IDENTITY)
    assert not record.claim(IDENTITY)
    with pytest.raises(IdentityError, match=r"seed: it has nothing, you asked for 3"):
        record.claim({**IDENTITY, "seed": 3})


def test_a_sweep_exists_once_it_is_claimed(storage: Storage) -> None:
    assert not SweepRecord.exists(storage, "s")
    make_trials(storage)
    assert SweepRecord.exists(storage, "s")
    assert not SweepRecord.exists(storage, "s" * 76)
    assert not SweepRecord.exists(storage, "../s")


OBJECTIVE: dict[str, Any] = {"metric": "error", "mode": "min"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is not JSON"),
        ('{"recipe": "searched:Line", "spa', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "it is no object"),
        ("null", "it is no object"),
        ("{}", "it has no objective, space"),
        (json.dumps({"space": {}}), "it has no objective"),
        (json.dumps({"space": [], "objective": OBJECTIVE}), "space cannot be"),
        (json.dumps({"space": {"lr": 3}, "objective": OBJECTIVE}), "space cannot be"),
        (json.dumps({"space": {}, "objective": "error"}), "objective cannot be"),
        (json.dumps({"space": {}, "objective": {"metric": 1, "mode": "min"}}), "objective cannot be"),
        (json.dumps({"space": {}, "objective": {**OBJECTIVE, "more": 1}}), "objective cannot be"),
        (json.dumps({"space": {}, "objective": OBJECTIVE, "recipe": 7}), "recipe cannot be"),
    ],
)
def test_a_damaged_sweep_file_is_named_with_what_to_do(storage: Storage, text: str, found: str) -> None:
    record = SweepRecord(storage, "s")
    record.claim(IDENTITY)
    (record.dir / "sweep.json").write_text(text)
    for use in (lambda: open_sweep(storage, "s"), lambda: record.claim(IDENTITY)):
        with pytest.raises(CorruptError, match=rf"s/sweep\.json.*{found}.*Restore it"):
            use()


def test_a_huge_sweep_file_is_not_read(storage: Storage) -> None:
    record = SweepRecord(storage, "s")
    record.claim(IDENTITY)
    os.truncate(record.dir / "sweep.json", 2**40)
    with pytest.raises(CorruptError, match=r"sweep\.json has more than"):
        open_sweep(storage, "s")


@pytest.mark.parametrize(
    "damage",
    [
        {"trial": 0},
        {"trial": 1e300},
        {"run": "../s-t002"},
        {"run": 2},
        {"fields": [1]},
        {"value": "1.0"},
        {"values": {"error": "1.0"}},
        {"values": []},
        {"step": "7"},
        {"error": None},
        {"source": {"run": "a"}},
    ],
)
def test_a_line_with_wrong_types_is_left_out(storage: Storage, damage: dict[str, Any]) -> None:
    record = SweepRecord(storage, "s")
    good = Trial(number=1, run="s-t001", fields={"lr": 0.1}, state=TrialState.FINISHED, value=1.0)
    record.book(good)
    line = {**json.loads(replace(good, number=2, run="s-t002").to_line()), **damage}
    append_line(record.trials_path, json.dumps(line))
    assert record.trials() == [good]


def test_a_name_must_leave_room_for_its_runs(storage: Storage) -> None:
    SweepRecord(storage, "s" * 75)
    with pytest.raises(RequestError, match="cannot name a run"):
        SweepRecord(storage, "s" * 76)


def test_a_damaged_line_is_left_out(storage: Storage) -> None:
    record = SweepRecord(storage, "s")
    good = Trial(number=1, run="s-t001", fields={"lr": 0.1}, state=TrialState.FINISHED, value=1.0)
    record.book(good)
    with record.trials_path.open("a") as file:
        file.write('{"trial": 2, "state": "no such"}\n{"trial": 3, "st')
    record.book(replace(good, value=2.0))
    assert record.trials() == [replace(good, value=2.0)]


def test_infinities_are_not_written(storage: Storage) -> None:
    record = SweepRecord(storage, "s")
    record.book(
        Trial(
            number=1,
            run="s-t001",
            fields={},
            state=TrialState.PRUNED,
            value=float("inf"),
            values={"a": float("nan"), "b": 1.0},
        )
    )
    assert record.trials()[0].value is None
    assert record.trials()[0].values == {"b": 1.0}


def trial_of(number: int, value: float | None, state: TrialState = TrialState.FINISHED) -> Trial:
    return Trial(number=number, run=run_of("s", number), fields={"lr": 0.1}, state=state, value=value)


def test_best_prefers_trials_that_are_done() -> None:
    running = trial_of(1, 0.1, TrialState.RUNNING)
    done = [trial_of(2, 0.5), trial_of(3, 0.4, TrialState.PRUNED), trial_of(4, 0.01, TrialState.FAILED)]
    assert best_of("s", [running, *done], Line.objective).number == 3
    assert best_of("s", [running], Line.objective).number == 1
    with pytest.raises(NotFoundError, match="has measured its objective"):
        best_of("s", [trial_of(1, None)], Line.objective)


def test_a_sweep_is_read_without_a_cluster(storage: Storage) -> None:
    make_trials(storage)
    record = SweepRecord(storage, "s")
    for number, value in enumerate((0.5, 0.25, 0.75), start=1):
        record.book(replace(trial_of(number, value), values={"error": value, "loss": value**2}))
    sweep = open_sweep(storage, "s")
    assert isinstance(sweep, Sweep)
    assert sweep.best.run == "s-t002"
    assert list(sweep.frame()["val_error"]) == [0.5, 0.25, 0.75]
    assert len(sweep.plot().axes) == 2
    assert "<th>0.25</th>" in sweep._repr_html_()
    assert repr(sweep) == "Sweep('s', 3 finished)"
    with pytest.raises(NotFoundError, match="no sweep 'other'; there are: s"):
        open_sweep(storage, "other")


def test_a_sweep_that_another_process_drives_is_stopped_by_its_name(storage: Storage) -> None:
    trials = make_trials(storage)
    sweep = open_sweep(storage, "s")
    assert not sweep.is_active
    with SweepRecord(storage, "s").lock:
        assert sweep.is_active
        sweep.stop()
    assert trials.is_stopping
    assert trials.next() is None


def test_a_driver_that_cannot_book_its_end_gives_the_sweep_back_and_says_why(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = make_trials(storage)

    def full() -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(trials, "close", full)
    released: list[bool] = []
    record = SweepRecord(storage, "s")
    sweep = Sweep(record, driver=SweepDriver(trials, lambda: None, lambda: released.append(True)))
    with pytest.raises(StorageError, match="no space left"):
        sweep.wait(progress=False, timeout_s=30)
    assert released


def test_importing_the_room_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, shoal.tune; print([m for m in ('torch', 'ray', 'optuna', 'pandas') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    path: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(root / "platform")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.strip() == "[]"
