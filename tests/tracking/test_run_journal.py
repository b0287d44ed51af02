"""What journal lines mean: no files, no cluster."""

from __future__ import annotations

import json
import math

import pytest

from shoal.errors import InternalError
from shoal.recipe import maximize, minimize
from shoal.tracking.journal import JournalSummary, RunState, best_by, encode, metrics_frame, parse

START = {"kind": "start", "step": 0, "target_steps": 10, "workers": 2, "t": 1.0}


def end(state):
    return {"kind": "end", "step": 10, "state": state, "error": "", "t": 9.0}


def metrics(step, **values):
    return {"kind": "metrics", "step": step, "values": values}


def evaluation(step, split="val", **values):
    return {"kind": "eval", "step": step, "split": split, "values": values}


@pytest.mark.parametrize(
    ("events", "is_locked", "state"),
    [
        ([], False, RunState.NEW),
        ([], True, RunState.RUNNING),
        ([START], True, RunState.RUNNING),
        ([START], False, RunState.INTERRUPTED),
        ([START, metrics(3, loss=1.0)], False, RunState.INTERRUPTED),
        ([START, end("finished")], False, RunState.FINISHED),
        ([START, end("finished")], True, RunState.FINISHED),  # its process is about to leave
        ([START, end("stopped")], False, RunState.STOPPED),
        ([START, end("failed")], False, RunState.FAILED),
        ([end("failed")], False, RunState.FAILED),  # never got its workers
        ([START, end("failed"), START], True, RunState.RUNNING),
        ([START, end("stopped"), START], False, RunState.INTERRUPTED),
        ([START, end("finished"), {"kind": "warning", "message": "late"}], False, RunState.FINISHED),
    ],
)
def test_state_follows_from_the_last_start_or_end_and_the_lock(events, is_locked, state):
    folded = JournalSummary()
    for event in events:
        folded.add(event)
    assert folded.state(is_locked=is_locked) is state


@pytest.mark.parametrize("value", [0.1, 1e308, -0.0, math.inf, -math.inf, math.nan])
def test_any_float_survives_and_the_line_is_legal_json(value):
    line = encode("metrics", t=1.5, attempt=2, fields={"step": 3, "values": {"loss": value}})
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["attempt"] == 2
    read = parse(line.encode())
    assert read is not None
    assert repr(read["values"]["loss"]) == repr(value)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"[]",
        b"3",
        b'{"kind": 3}',
        b'{"kind": "metrics", "step": 1, "values": {"los',
        b'{"kind": "metrics", "values": {}}',
        b'{"kind": "metrics", "step": "1", "values": {}}',
        b'{"kind": "metrics", "step": 1}',
        b'{"kind": "metrics", "step": 1, "values": [1]}',
        b'{"kind": "metrics", "step": 1, "values": {"loss": "low"}}',
        b'{"kind": "eval", "step": 1, "values": {}}',
        b'{"kind": "end", "state": "exploded"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_no_event(line):
    assert parse(line) is None


def test_a_kind_of_a_newer_writer_is_kept():
    assert parse(b'{"kind": "of tomorrow", "t": 1}') == {"kind": "of tomorrow", "t": 1}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("began", {}), ("end", {"state": "done"}), ("start", {"t": 1}), ("warning", {"message": object()})],
)
def test_a_line_that_the_journal_does_not_know_is_our_bug(kind, fields):
    with pytest.raises(InternalError):
        encode(kind, t=0.0, attempt=1, fields=fields)


def test_a_long_traceback_keeps_its_end_and_fits_a_line():
    fields = {
        "state": "failed",
        "step": 1,
        "error": "\U0001f41f" * 10**6,
        "traceback": "\U0001f41f" * 10**6 + "end",
    }
    line = encode("end", t=0.0, attempt=1, fields=fields)
    assert len(line) < 2**20
    assert json.loads(line)["traceback"].endswith("end")


def test_metrics_frame_prefixes_evaluations_and_the_later_line_wins():
    frame = metrics_frame(
        [
            START,
            evaluation(2, accuracy=0.5),
            metrics(1, loss=3.0),
            metrics(2, loss=2.0, lr=0.1),
            metrics(2, loss=1.5),  # a resumed run repeats step 2
            evaluation(2, "test", accuracy=0.4),
            evaluation(2, accuracy=0.6),
        ]
    )
    assert frame.index.name == "step"
    assert list(frame.index) == [1, 2]
    assert list(frame.columns) == ["loss", "lr", "val_accuracy", "test_accuracy"]
    assert frame.loc[2].to_dict() == {"loss": 1.5, "lr": 0.1, "val_accuracy": 0.6, "test_accuracy": 0.4}
    assert math.isnan(frame.loc[1, "lr"])


def test_metrics_frame_of_nothing_is_empty():
    frame = metrics_frame([START])
    assert frame.empty
    assert frame.index.name == "step"


def test_best_by_takes_the_earliest_of_equals_never_nan_and_the_later_line_of_a_step():
    lines = [
        evaluation(1, loss=math.nan),
        evaluation(2, loss=0.1),  # repeated below, with another value
        evaluation(3, loss=0.3),
        evaluation(4, loss=0.3),
        evaluation(5, accuracy=1.0),
        evaluation(2, loss=0.7),
    ]
    assert best_by(lines, minimize("loss"))["step"] == 3
    assert best_by(lines, maximize("loss"))["step"] == 2
    assert best_by(lines, maximize("f1")) is None
    assert best_by([evaluation(1, loss=math.nan)], maximize("loss")) is None
