"""A run's record on storage."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc

import pytest

from shoal.errors import (
    CorruptError,
    IdentityError,
    InternalError,
    NotFoundError,
    RecipeError,
    RequestError,
    WorkerLost,
)
from shoal.recipe import maximize
from shoal.storage import FileLock, Storage
from shoal.tracking import RunRecord, RunState, list_runs

IDENTITY = {"recipe": "jobs.digits:Digits", "fields": {"lr": 1e-3, "hidden": (64, 64)}, "seed": 0}


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path)


@pytest.fixture
def record(storage):
    ticks = itertools.count(100)
    return RunRecord(storage, "digits-1", clock=lambda: float(next(ticks)))


@pytest.mark.parametrize("name", ["a", "digits-0a1b2c3d", "x" * 80, "0.a_b-c", "a..b"])
def test_names_that_may_name_a_run(storage, name):
    assert RunRecord(storage, name).dir.parent == storage.runs_dir


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "A", "-a", "_a", "x" * 81, "a\n", "a b", "ä", "a\0", None]
)
def test_names_that_may_not(storage, name):
    with pytest.raises(RequestError, match="cannot name a run"):
        RunRecord(storage, name)
    assert not storage.runs_dir.exists()


def test_identity_is_claimed_once(record, storage):
    assert record.identity() is None
    assert record.claim_identity(IDENTITY)
    assert not RunRecord(storage, "digits-1").claim_identity({**IDENTITY})
    assert record.identity()["fields"] == {"lr": 1e-3, "hidden": [64, 64]}


def test_another_identity_is_refused_with_every_difference(record):
    record.claim_identity(IDENTITY)
    other = {"recipe": "jobs.digits:Digits", "fields": {"lr": 0.1, "depth": 2}, "seed": False}
    with pytest.raises(IdentityError) as caught:
        record.claim_identity(other)
    text = str(caught.value)
    assert "fields.lr: it has 0.001, you asked for 0.1" in text
    assert "fields.hidden: it has [64, 64], you asked for nothing" in text
    assert "fields.depth: it has nothing, you asked for 2" in text
    assert "seed: it has 0, you asked for false" in text
    assert "recipe" not in text
    assert "--name" in text
    assert record.identity()["seed"] == 0


def test_of_many_claims_at_once_one_is_fresh(storage):
    fresh = []
    barrier = threading.Barrier(8)

    def claim():
        barrier.wait()
        fresh.append(RunRecord(storage, "same").claim_identity(IDENTITY))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fresh) == [False] * 7 + [True]


def test_lines_carry_time_and_attempt_also_those_of_another_process(record, storage):
    driver = RunRecord(storage, "digits-1", clock=lambda: 7.0)
    driver.append("warning", message="waiting for room")
    record.append("start", step=0, target_steps=10)
    record.append("metrics", step=1, values={"loss": 1.0})
    record.append("start", step=0, target_steps=12)
    driver.append("end", step=1, state="failed", error="lost")
    assert [(event["kind"], event["attempt"]) for event in record.events()] == [
        ("warning", 1),
        ("start", 1),
        ("metrics", 1),
        ("start", 2),
        ("end", 2),
    ]
    assert [event["t"] for event in record.events(["start"])] == [100.0, 102.0]
    assert (driver.attempt, driver.step, driver.target_steps) == (2, 1, 12)


def _raised(error, *, cause=None):
    try:
        raise error from cause
    except type(error) as err:
        return err


@pytest.mark.parametrize(
    ("failure", "error", "kind", "has_traceback"),
    [
        (None, "", "", False),
        (KeyError("x"), "KeyError: 'x'", "RecipeError", True),
        (RecipeError("no loss"), "no loss", "RecipeError", False),
        (_raised(RecipeError("bad"), cause=ValueError("deep")), "bad", "RecipeError", True),
        (_raised(WorkerLost("gone"), cause=ValueError("deep")), "gone", "WorkerLost", False),
    ],
)
def test_the_last_line_says_why(record, failure, error, kind, has_traceback):
    record.append_end(RunState.FAILED, step=3, failure=failure, unknown=RecipeError)
    (end,) = record.events(("end",))
    assert (end["step"], end["state"], end["error"], end["error_type"]) == (3, "failed", error, kind)
    assert bool(end["traceback"]) == has_traceback


def test_a_failure_outside_the_recipe_is_a_bug(record):
    record.append_end(RunState.FAILED, step=0, failure=KeyError("x"))
    assert record.events(("end",))[0]["error_type"] == "InternalError"


def test_only_an_end_ends(record):
    with pytest.raises(InternalError, match="running"):
        record.append_end(RunState.RUNNING, step=0)


def test_state_watches_the_lock(record):
    assert record.state() is RunState.NEW
    record.append("start", step=0, target_steps=3)
    assert record.state() is RunState.INTERRUPTED
    with FileLock(record.lock_path):
        assert record.state() is RunState.RUNNING
    record.append("end", step=3, state="finished", error="")
    assert record.state() is RunState.FINISHED


def test_damage_in_the_middle_costs_only_its_own_line(record, caplog):
    record.append("metrics", step=1, values={"loss": 1.0})
    with record.journal_path.open("ab") as journal:
        journal.write(b'{"kind": "metrics", "st\x00\xff\n{"kind": "metr')  # and torn at the end
    assert [event["step"] for event in record.events()] == [1]
    record.append("metrics", step=2, values={"loss": 0.5})
    assert [event["step"] for event in record.events()] == [1, 2]
    assert "cannot be read" in caplog.text


@pytest.mark.timeout(20)
def test_a_journal_that_is_a_pipe_is_damage_and_not_waited_for(record):
    record.dir.mkdir(parents=True)
    os.mkfifo(record.journal_path)
    with pytest.raises(CorruptError, match=r"journal\.jsonl is no plain file but a pipe"):
        record.state()


def test_a_line_that_never_ends_is_passed_over_without_being_held_in_memory(record):
    record.append("metrics", step=1, values={"loss": 1.0})
    with record.journal_path.open("ab") as journal:
        journal.truncate(journal.tell() + 512 * 2**20)  # a hole: takes no room on the disk
    record.append("metrics", step=2, values={"loss": 0.5})
    tracemalloc.start()
    assert [event["step"] for event in record.events()] == [1, 2]
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most_bytes < 32 * 2**20


def test_events_since_gives_each_line_once_however_it_was_cut(record, monkeypatch):
    for step in range(50):
        record.append("metrics", step=step, values={"loss": step / 7})
    content = record.journal_path.read_bytes()
    monkeypatch.setattr("shoal.tracking.record._CHUNK_BYTES", 10)  # less than a line
    record.journal_path.write_bytes(b"")
    seen, offset = [], 0
    with record.journal_path.open("ab", buffering=0) as journal:
        for start in range(0, len(content), 37):
            journal.write(content[start : start + 37])
            events, offset = record.events_since(offset)
            seen += events
    while True:
        events, end = record.events_since(offset)
        if end == offset:
            break
        seen, offset = seen + events, end
    assert [event["step"] for event in seen] == list(range(50))
    assert [event["step"] for event in record.events()] == list(range(50))
    assert offset == len(content)


def test_a_run_made_anew_under_the_same_name_starts_over(record):
    record.append("start", step=0, target_steps=9)
    record.append("metrics", step=9, values={"loss": 1.0})
    assert record.step == 9
    line = record.journal_path.read_bytes().splitlines(keepends=True)[0]
    record.journal_path.write_bytes(line)  # shorter than what was read
    assert (record.attempt, record.step, record.target_steps) == (1, 0, 9)
    record.journal_path.unlink()
    assert (record.attempt, record.step) == (0, 0)
    record.append("start", step=0, target_steps=5)
    assert (record.attempt, record.step, record.target_steps) == (1, 0, 5)


def test_best_checkpoint_is_one_that_still_exists(record):
    for step, accuracy in ((1, 0.9), (2, 0.7), (3, 0.8)):
        path = f"checkpoints/step-{step:010}"
        record.append("checkpoint", step=step, path=path, size_bytes=1, values={"accuracy": accuracy})
        record.append("eval", step=step, split="val", values={"accuracy": accuracy})
        record.append("eval", step=step, split="test", values={"accuracy": 1.0 - accuracy})
        if step > 1:
            (record.dir / path).mkdir(parents=True)
    assert record.best(maximize("accuracy"))["step"] == 1
    assert record.best_checkpoint(maximize("accuracy"))["step"] == 3
    assert record.last_eval("val") == {"accuracy": 0.8}
    assert record.last_eval("train") is None
    assert list(record.metrics_frame().columns) == ["val_accuracy", "test_accuracy"]


def test_a_stop_is_asked_for_until_it_is_cleared(record, storage):
    with pytest.raises(NotFoundError, match="shoal runs"):
        record.mark_stop()
    record.claim_identity(IDENTITY)
    record.mark_stop()
    record.mark_stop()
    assert RunRecord(storage, "digits-1").stop_requested()
    record.clear_stop()
    record.clear_stop()
    assert not record.stop_requested()


def test_a_run_exists_once_it_has_an_identity(record, storage):
    assert not RunRecord.exists(storage, "digits-1")
    record.append("warning", message="no identity")
    assert not RunRecord.exists(storage, "digits-1")
    record.claim_identity(IDENTITY)
    assert RunRecord.exists(storage, "digits-1")
    assert not RunRecord.exists(storage, "../runs/digits-1")


def test_a_run_says_which_trial_it_is(record):
    assert record.trial() is None
    record.claim_trial("search", 7)
    assert record.trial() == ("search", 7)
    (record.dir / "trial.json").write_text('{"sweep": "search"}')
    with pytest.raises(CorruptError, match=r"trial\.json"):
        record.trial()


def test_list_runs_has_those_with_an_identity_newest_first(storage):
    assert list_runs(storage) == []
    for age, name in enumerate(("b", "c", "a")):
        RunRecord(storage, name).claim_identity(IDENTITY)
        os.utime(storage.run_dir(name) / "identity.json", (1000 - age, 1000 - age))
    RunRecord(storage, "unborn").append("warning", message="no identity")
    (storage.runs_dir / "Not A Run").mkdir()
    (storage.runs_dir / "Not A Run" / "identity.json").touch()
    assert [record.name for record in list_runs(storage)] == ["b", "c", "a"]


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_damaged_identity_names_its_file(record, text):
    record.claim_identity(IDENTITY)
    (record.dir / "identity.json").write_text(text)
    with pytest.raises(CorruptError, match=r"identity\.json"):
        record.identity()


@pytest.mark.parametrize(
    "damage",
    [
        {"objective": {"metric": "accuracy"}},
        {"objective": {"metric": "accuracy", "mode": "best"}},
        {"objective": "accuracy"},
        {"fields": []},
        {"recipe": None},
        {"source": {"run": "a", "step": "1", "digest": ""}},
    ],
)
def test_an_identity_with_wrong_types_names_its_file_and_the_part(record, damage):
    record.claim_identity(IDENTITY)
    (record.dir / "identity.json").write_text(json.dumps({**IDENTITY, **damage}))
    (part,) = damage
    with pytest.raises(CorruptError, match=rf"identity\.json is damaged: {part} cannot be .*Restore it"):
        record.identity()


def test_a_record_travels(record):
    record.claim_identity(IDENTITY)
    assert pickle.loads(pickle.dumps(record)).identity() == record.identity()


def test_importing_tracking_loads_nothing_heavy():
    heavy = "{'mlflow', 'pandas', 'ray', 'torch'}"
    code = f"import sys, shoal.tracking; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
