"""Delivery: what MLflow knows after journals grew, servers went away and trackers were killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from shoal.errors import RequestError, TrackingError
from shoal.storage import FileLock, Storage
from shoal.tracking import RunRecord, Tracker
from shoal.tracking.delivery import Batch, Point
from shoal.tracking.tracker import MAX_BACKOFF_S, _journal_id
from waiting import DEADLINE_S

SECONDS = itertools.count(1_700_000_000)
IDENTITY = {"recipe": "jobs.digits:Digits", "fields": {"lr": 0.1}, "seed": 7}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tracker(storage, fake, clock):
    tracker = Tracker(storage, "fake://", open_store=lambda: fake, clock=clock)
    yield tracker
    tracker.close()


def begin(storage, name="digits-1", steps=5, **identity):
    record = RunRecord(storage, name, clock=lambda: float(next(SECONDS)))
    record.claim_identity({**IDENTITY, **identity})
    record.append("start", step=0, target_steps=steps, workers=2, host="here", source="fresh")
    for step in range(1, steps + 1):
        record.append("metrics", step=step, values={"loss": 1 / step})
    return record


def finish(record, state="finished", **fields):
    record.append("end", step=record.step, state=state, error="", **fields)


# The contract: the same with the fake and with MLflow


@pytest.fixture(params=["fake", pytest.param("mlflow", marks=pytest.mark.slow)])
def seen(request, storage, fake):
    """``deliver()`` makes one pass with a new tracker; ``runs()`` is what the store then knows, by name."""
    if request.param == "mlflow":
        return Seen(storage, request.getfixturevalue("open_mlflow"), _of_mlflow)
    return Seen(storage, lambda: fake, lambda _: {run.name: _of_fake(run) for run in fake.runs.values()})


class Seen:
    def __init__(self, storage, open_store, read):
        self._storage, self._open, self._read = storage, open_store, read

    def deliver(self):
        tracker = Tracker(self._storage, "any", open_store=self._open)
        status = tracker.flush()
        tracker.close()
        assert status.state == "ok", status
        return status

    def runs(self):
        return self._read(self._open())


def _of_fake(run):
    return {
        "experiment": run.experiment,
        "state": run.state,
        "metrics": sorted(run.metrics),
        "timeline": sorted(run.timeline),
        "params": run.params,
        "files": run.files,
        "tags": {key: value for key, value in run.tags.items() if key.startswith("shoal.")},
    }


def _of_mlflow(store):
    client = store.client
    found = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            run_id = run.info.run_id
            assert run.info.run_name not in found, "one run was delivered as two"
            points = sorted(
                (point.key, point.step, point.timestamp, repr(point.value))
                for key in run.data.metrics
                for point in client.get_metric_history(run_id, key)
            )
            found[run.info.run_name] = {
                "experiment": experiment.name,
                "state": run.data.tags["shoal.state"],
                "metrics": [point for point in points if not point[0].startswith("timeline/")],
                "timeline": [point for point in points if point[0].startswith("timeline/")],
                "params": run.data.params,
                "files": {
                    item.path: Path(client.download_artifacts(run_id, item.path)).read_text()
                    for folder in (None, "logs")
                    for item in client.list_artifacts(run_id, folder)
                    if not item.is_dir
                },
                "tags": {
                    key: value
                    for key, value in run.data.tags.items()
                    if key.startswith("shoal.") and key not in ("shoal.state", "shoal.journal")
                },
            }
    return found


def test_a_run_is_known_whole(seen, storage):
    record = begin(storage, steps=3)
    record.append("eval", step=3, split="val", values={"accuracy": 0.5})
    finish(record)
    seen.deliver()
    (run,) = seen.runs().values()
    assert run["experiment"] == "Digits"
    assert run["state"] == "finished"
    assert run["params"] == {"lr": "0.1", "identity.recipe": "jobs.digits:Digits", "identity.seed": "7"}
    assert [(key, step, value) for key, step, _, value in run["metrics"]] == [
        ("loss", 1, "1.0"),
        ("loss", 2, "0.5"),
        ("loss", 3, repr(1 / 3)),
        ("val_accuracy", 3, "0.5"),
    ]
    assert run["files"].keys() == {"identity.json", "timeline.json"}
    assert run["tags"]["shoal.workers"] == "2"


def test_delivering_all_again_changes_nothing(seen, storage):
    record = begin(storage, steps=4)
    record.append("metrics", step=5, values={"loss": math.nan, "lr": 1e-3})
    record.append("metrics", step=5, values={"loss": math.nan, "lr": 1e-3})
    finish(record)
    seen.deliver()
    before = seen.runs()
    shutil.rmtree(storage.tracking_dir / "delivered")
    seen.deliver()
    assert seen.runs() == before
    assert sum(key == "loss" for key, *_ in before["digits-1"]["metrics"]) == 6


def test_an_end_says_how_the_time_was_spent_and_says_it_again_when_the_run_has_gone_on(seen, storage):
    record = begin(storage, steps=3)
    finish(record, "stopped")
    seen.deliver()
    run = seen.runs()["digits-1"]
    told = {key: float(value) for key, _, _, value in run["timeline"]}
    goodput = told["timeline/goodput"]
    assert 0 < goodput < 1
    assert (told["timeline/starts"], told["timeline/steps_lost"]) == (1, 0)
    assert json.loads(run["files"]["timeline.json"])["goodput"] == goodput
    shutil.rmtree(storage.tracking_dir / "delivered")
    record.append("start", step=3, target_steps=9, workers=2, host="here", source="checkpoint")
    seen.deliver()
    assert seen.runs()["digits-1"]["timeline"] == run["timeline"]


def test_what_comes_later_is_added(seen, storage):
    record = begin(storage, steps=2)
    seen.deliver()
    assert seen.runs()["digits-1"]["state"] == "interrupted"
    with FileLock(record.lock_path):
        seen.deliver()
        assert seen.runs()["digits-1"]["state"] == "running"
        record.append("metrics", step=3, values={"loss": 0.25})
        seen.deliver()
    assert len(seen.runs()["digits-1"]["metrics"]) == 3
    finish(record, "stopped")
    seen.deliver()
    assert seen.runs()["digits-1"]["state"] == "stopped"


def test_a_failure_is_kept_with_traceback_and_logs(seen, storage):
    record = begin(storage)
    record.logs_dir.mkdir()
    (record.logs_dir / "rank-0.log").write_text("boom\n")
    finish(record, "failed", traceback="Traceback: boom")
    seen.deliver()
    run = seen.runs()["digits-1"]
    assert run["state"] == "failed"
    assert run["files"]["traceback.txt"] == "Traceback: boom"
    assert run["files"]["logs/rank-0.log"] == "boom\n"


def test_values_and_names_that_a_store_finds_odd(seen, storage):
    record = begin(storage, steps=1)
    record.append("metrics", step=2, values={"gräd@norm": 1.0, "big": math.inf, "nan": math.nan, "../x": 2.0})
    finish(record)
    assert seen.deliver().warnings == ()
    keys = {key for key, *_ in seen.runs()["digits-1"]["metrics"]}
    assert {"gräd_norm", "nan", "___x", "big"} <= keys


def test_text_that_is_not_utf8_is_delivered_too(seen, storage):
    finish(begin(storage, recipe="jobs.x:caf\udce9", fields={"note": "caf\udce9"}))
    finish(begin(storage, name="digits-2"))
    assert seen.deliver().warnings == ()
    runs = seen.runs()
    assert runs["digits-1"]["params"]["note"] == "caf?"
    assert runs["digits-1"]["tags"]["shoal.recipe"] == "jobs.x:caf?"
    assert runs["digits-2"]["state"] == "finished"


@pytest.mark.slow
def test_what_mlflow_cannot_hold_is_refused_and_no_outage(open_mlflow):
    store = open_mlflow()
    run_id = store.ensure_run(experiment="x", name="r", journal="1", start_ms=0, tags={})
    cannot_be_held = [
        Batch(metrics=(Point(key="loss", value=1.0, timestamp_ms=0, step=2**70),)),
        Batch(params=(("note", "caf\udce9"),)),
    ]
    for batch in cannot_be_held:
        with pytest.raises(RequestError, match="refused"):
            store.log(run_id, batch)


def test_more_than_one_batch_holds(seen, storage):
    record = begin(storage, steps=0)
    for step in range(3):
        record.append("metrics", step=step, values={f"m{n}": float(n) for n in range(450)})
    finish(record)
    seen.deliver()
    assert len(seen.runs()["digits-1"]["metrics"]) == 3 * 450


# Outages and kills, with the fake


def test_nothing_is_lost_while_the_store_is_down(tracker, storage, fake, clock):
    record = begin(storage)
    fake.down = True
    tracker.poll()
    status = tracker.status()
    assert (status.state, status.error, status.behind_runs) == ("error", "down", 1)
    assert status.behind_bytes == record.journal_path.stat().st_size
    finish(record)
    fake.down = False
    tracker.poll()  # too early: the backoff has not passed
    assert not fake.runs
    clock.now += 1.0
    tracker.poll()
    (run,) = fake.runs.values()
    assert len(run.metrics) == 5
    assert run.state == "finished"
    assert tracker.status().state == "ok"
    assert tracker.status().behind_bytes == 0


def test_backoff_grows_to_its_limit_and_flush_does_not_wait(tracker, storage, fake, clock):
    begin(storage)
    fake.down = True
    waits = []
    for _ in range(8):
        tracker.poll()
        before, calls = clock.now, fake.num_calls
        while fake.num_calls == calls:
            clock.now += 0.5
            tracker.poll()
        waits.append(clock.now - before)
        clock.now += 1e4
    assert waits[0] == pytest.approx(2.0, abs=1.0)
    assert max(waits) == MAX_BACKOFF_S
    fake.down = False
    assert tracker.flush().state == "ok"


@pytest.mark.parametrize("num_answers", range(12))
def test_a_store_that_dies_midway_has_everything_once_in_the_end(tracker, storage, fake, num_answers):
    record = begin(storage, steps=0)
    for step in range(3):
        record.append("metrics", step=step, values={f"m{n}": float(n) for n in range(700)})
    finish(record)
    fake.fail_after(num_answers)
    tracker.flush()
    tracker.flush()
    (run,) = fake.runs.values()
    assert (len(run.metrics), run.state, len(run.params)) == (2100, "finished", 3)


def test_one_refused_entry_is_left_out_and_named(tracker, storage, fake):
    record = begin(storage, steps=4)
    record.append("metrics", step=5, values={"loss": 0.0, "bad": 1.0})
    finish(record)
    fake.refused = "bad"
    assert tracker.flush().state == "ok"
    (run,) = fake.runs.values()
    assert len(run.metrics) == 5
    (warning,) = tracker.status().warnings
    assert "digits-1" in warning
    assert "bad" in warning


def test_a_run_deleted_in_mlflow_does_not_hold_up_the_others(tracker, storage, fake):
    first = begin(storage, "first")
    tracker.flush()
    fake.runs["run-0"].deleted = True
    finish(first)
    second = begin(storage, "second")
    finish(second)
    assert tracker.flush().state == "ok"
    assert fake.runs["run-1"].state == "finished"
    calls = fake.num_calls
    tracker.flush()
    assert fake.num_calls == calls


def test_a_run_purged_from_mlflow_is_told_again(tracker, storage, fake):
    record = begin(storage)
    tracker.flush()
    fake.runs.clear()
    finish(record)
    tracker.flush()
    tracker.flush()
    (run,) = fake.runs.values()
    assert (len(run.metrics), run.state) == (5, "finished")


@pytest.mark.parametrize("is_noticed", [False, True])
def test_a_run_made_anew_is_another_run(tracker, storage, fake, is_noticed):
    record = begin(storage)
    finish(record)
    tracker.flush()
    shutil.move(record.dir, storage.root / "kept")  # so that its inode is not given again
    if is_noticed:
        tracker.flush()
    finish(begin(storage, steps=9))
    tracker.flush()
    assert [len(run.metrics) for run in fake.runs.values()] == [5, 9]


def delivered(record, **changes):
    journal = _journal_id(record)
    return json.dumps({"journal": journal, "run_id": "r", "offset": 0, "state": "running", **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: "[]",
        lambda record: delivered(record, offset=float("inf")),
        lambda record: delivered(record, offset=-5),
        lambda record: delivered(record, offset="x"),
    ],
)
def test_a_damaged_identity_or_delivered_file_does_not_stop_delivery(tracker, storage, fake, damage):
    record = begin(storage)
    (record.dir / "identity.json").write_text("{")
    (storage.tracking_dir / "delivered").mkdir(parents=True)
    (storage.tracking_dir / "delivered" / "digits-1.json").write_text(damage(record))
    assert tracker.flush().state == "ok"
    (run,) = fake.runs.values()
    assert len(run.metrics) == 5
    assert len(tracker.status().warnings) == 2


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("what", ["journal", "identity", "delivered", "logs"])
def test_a_run_that_cannot_be_read_does_not_hold_up_the_others(tracker, storage, fake, what, make):
    bad = begin(storage, "a-bad")
    finish(bad, state="failed")
    delivered = storage.tracking_dir / "delivered"
    delivered.mkdir(parents=True)
    bad.logs_dir.mkdir()
    if what == "journal":  # a folder in its place: the same OSError for every user, root too
        bad.journal_path.unlink()
        make(bad.journal_path)
    elif what == "identity":
        bad.identity_path.unlink()
        make(bad.identity_path)
    elif what == "delivered":
        make(delivered / "a-bad.json")
    else:
        make(bad.logs_dir / "rank-0.log")
    finish(begin(storage, "b-good"))
    for _ in range(3):
        assert tracker.flush().state in ("ok", "behind")
    states = {run.name: run.state for run in fake.runs.values()}
    assert states["b-good"] == "finished"
    warnings = tracker.status().warnings
    assert 1 <= len(warnings) <= 2, "once each, not at every pass"
    assert all("a-bad" in warning for warning in warnings)


def test_a_run_that_can_be_read_again_is_delivered(tracker, storage, fake):
    record = begin(storage)
    finish(record)
    text = record.journal_path.read_text()
    record.journal_path.unlink()
    record.journal_path.mkdir()
    tracker.flush()
    record.journal_path.rmdir()
    record.journal_path.write_text(text)
    assert tracker.flush().state == "ok"
    assert [run.state for run in fake.runs.values()] == ["finished"]


def test_trials_of_a_sweep_are_together(tracker, storage, fake):
    storage.sweep_dir("other").mkdir(parents=True)
    for name in ("search-t001", "other-t001", "damaged-t001"):
        record = begin(storage, name)
        if name.startswith("search"):
            record.claim_trial("search", 1)
        if name.startswith("damaged"):
            (record.dir / "trial.json").write_text("[]")
        finish(record)
    tracker.flush()
    assert {run.name: run.experiment for run in fake.runs.values()} == {
        "search-t001": "search",
        "other-t001": "Digits",  # called as a trial is, and none
        "damaged-t001": "Digits",
    }


def test_a_settled_run_costs_no_calls(tracker, storage, fake):
    finish(begin(storage))
    tracker.flush()
    calls = fake.num_calls
    tracker.flush()
    assert fake.num_calls == calls


def test_half_a_line_is_not_behind(tracker, storage):
    record = begin(storage)
    with record.journal_path.open("a") as journal:
        journal.write('{"kind": "metr')
    assert tracker.flush().state == "ok"


def test_a_second_tracker_of_the_same_storage_is_refused(tracker, storage, fake):
    begin(storage)
    tracker.flush()
    second = Tracker(storage, "fake", open_store=lambda: fake)
    status = second.flush()
    assert status.state == "error"
    assert "shoal down" in status.error
    with pytest.raises(TrackingError, match="another tracker"):
        second.registry.models()
    tracker.close()
    assert second.flush().state == "ok"
    second.close()


def test_the_background_thread_delivers(tracker, storage, fake):
    record = begin(storage)
    tracker.start()
    finish(record)
    assert fake.settled.wait(timeout=DEADLINE_S), tracker.status()


def test_no_credentials_in_what_people_see(storage):
    def refuse():
        raise TrackingError("no")

    tracker = Tracker(storage, "https://ann:s3cret@host/mlflow", open_store=refuse)
    assert tracker.flush().uri == "https://host/mlflow"
    tracker.close()
