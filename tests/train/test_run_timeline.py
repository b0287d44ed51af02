"""What a person gets of a run's timeline: a frame, a plot, a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.storage import FileLock, Storage
from shoal.tracking import RunRecord
from shoal.train.run import Run
from shoal.train.timeline import RunTimeline, read_timeline, seconds_text


class Clock:
    now = 1_795_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """A run that lost a worker, and trains."""
    clock = Clock()
    record = RunRecord(Storage(tmp_path), "digits", clock=clock)
    record.claim_identity({"recipe": "jobs.digits:Digits", "fields": {}})
    for t, kind, fields in (
        (0.0, "driver", {"workers": "2", "host": "here", "pid": 7}),
        (1.0, "start", {"workers": 2, "pids": [11, 12], "step": 0, "source": "fresh"}),
        (2.0, "first_step", {"step": 1}),
        (6.0, "lost", {"ranks": [0], "step": 41, "why": "<died>"}),
        (6.25, "start", {"workers": 2, "pids": [13, 12], "step": 41, "source": "checkpoint"}),
        (6.5, "first_step", {"step": 42}),
    ):
        clock.now = Clock.now + t
        record.append(kind, **fields)
    return record


def test_a_run_that_goes_on_is_told_up_to_now(record: RunRecord) -> None:
    with FileLock(record.driver_lock_path):
        timeline = read_timeline(record, now=Clock.now + 10)
    assert timeline.goodput == pytest.approx((4 + 3.5) / 10)
    assert repr(timeline) == (
        "RunTimeline('digits', goodput 75.0 % (7.5 s of steps that count in 10 s), "
        "1 recovery (median 0.5 s, longest 0.5 s), 0 steps lost)"
    )
    killed = Run(record).timeline()
    assert isinstance(killed, RunTimeline)
    assert killed.moments[-1].kind == "vanished"


def test_frames_plot_and_page_show_the_same(record: RunRecord) -> None:
    timeline = Run(record).timeline()
    frame = timeline.frame()
    assert list(frame["kind"]) == ["driver", "start", "lost", "recovery", "start", "vanished"]
    assert frame["seconds"].isna().tolist() == [True, False, True, False, False, True]
    assert str(frame["time"].dt.tz) == "UTC"
    spans = timeline.spans_frame()
    assert spans["seconds"].sum() == pytest.approx(timeline.wall_s)
    figure = timeline.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["starting", "steps", "recovering"]
    html = timeline._repr_html_()
    assert "rank 0 (pid 11)" in html
    assert "goodput" in html


def test_a_run_without_lines_has_an_empty_timeline(tmp_path: Path) -> None:
    timeline = read_timeline(RunRecord(Storage(tmp_path), "new"))
    assert "not known yet" in repr(timeline)
    assert timeline.frame().empty
    assert timeline.plot()._repr_png_()  # type: ignore[attr-defined]
    json.dumps(timeline.as_dict())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0012, "1.2 ms"), (0.354, "0.354 s"), (99.5, "99.5 s"), (111.4, "111 s"), (7507, "2:05:07")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
