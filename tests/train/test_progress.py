"""What a person sees of a run that goes on, is stopped, or ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from shoal.config import Range
from shoal.errors import EnvironmentFailure
from shoal.storage import Storage
from shoal.tracking import RunRecord
from shoal.train import progress
from shoal.train import run as runs
from shoal.train.driver import WorkersDriver
from shoal.train.run import Run
from shoal.train.spec import RunSpec
from shoal.train.stall import StallReport, record_stall, stall_text
from terminal import screen_of
from toy import Toy


class PlayedDriver:
    """Goes through the scenes that a test wrote, one each time somebody looks whether it is alive."""

    def __init__(self, record: RunRecord) -> None:
        self._begin = record.end_offset
        self.scenes: list[object] = []
        self.was_stopped = False

    def is_alive(self) -> bool:
        if self.scenes and callable(scene := self.scenes.pop(0)):
            scene()
        return bool(self.scenes)

    def failure(self) -> BaseException | None:
        return None

    def waits_for(self) -> str:
        return "room for 2 workers"

    def begin(self) -> int:
        return self._begin

    def stop(self) -> None:
        self.was_stopped = True

    def abort(self) -> None:
        self.scenes = []


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    record = RunRecord(Storage(tmp_path), "digits-1")
    record.claim_identity({"recipe": "a:B", "objective": {"metric": "accuracy", "mode": "max"}})
    return record


@pytest.fixture(autouse=True)
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(runs, "POLL_S", 0.0)


def start(record: RunRecord, step: int) -> None:
    record.append("start", workers=2, pids=[], host="here", step=step, target_steps=2000, source="checkpoint")


def reach(record: RunRecord, step: int, accuracy: float) -> None:
    record.append("metrics", step=step, values={"loss": 0.5, "samples_per_s": 1234.0})
    record.append("eval", step=step, split="val", values={"accuracy": accuracy})
    record.append("checkpoint", step=step, path="x", size_bytes=1, seconds=0.1, values={})


def end(record: RunRecord, state: str, step: int) -> None:
    record.append("end", step=step, state=state, error="", traceback="")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_that_goes_on_shows_what_it_waits_for_not_what_was(
    record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    start(record, 0)
    reach(record, 700, 0.75)
    driver = PlayedDriver(record)
    driver.scenes = [1, 1, lambda: start(record, 700), 1, lambda: end(record, "stopped", 700), 1]
    Run(record, driver=driver).wait()
    written = capsys.readouterr().out
    starting, resumed, rest = written.partition("resumed from step 700 on 2 workers")
    assert resumed
    assert "starting: waiting for room for 2 workers" in starting
    for old in ("700", "1,234", "0.75"):
        assert old not in starting
    assert "700/2,000" in rest


def test_a_resize_shows_where_it_was_committed_and_how_many_go_on(
    record: RunRecord, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    driver = PlayedDriver(record)

    def leave() -> None:
        record.append("resize", step=710, **{"from": 2, "to": 1})

    def go_on() -> None:
        record.append("start", workers=1, pids=[], host="", step=710, target_steps=2000, source="checkpoint")
        record.append("metrics", step=720, values={"loss": 0.25})

    driver.scenes = [lambda: start(record, 700), leave, go_on, lambda: end(record, "stopped", 721), 1]
    Run(record, driver=driver).wait()
    assert capsys.readouterr().out.splitlines() == [
        "resumed from step 700 on 2 workers",
        "step 700/2,000  2 workers",
        "committed at step 710 to go on with 1 worker",
        "step 710/2,000  resizing: waiting for room for 2 workers",  # what this driver says
        "resumed from step 710 on 1 worker",
        "step 720/2,000  loss 0.25  1 worker",
        "step 721/2,000  loss 0.25  1 worker",
    ]


def test_the_time_that_is_left_is_whole_on_100_columns() -> None:
    shown = Progress(*progress._columns())
    detail = "loss 0.05652  val accuracy 0.9667  9,046 samples/s  2 workers"
    shown.add_task("demo-1129-023222", total=3000, completed=2415, count="2,415/3,000", detail=detail)
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(shown.get_renderable())
    assert captured.get().split()[-3:] == ["2", "workers", "--:--"]


def test_a_notebook_draws_anew_with_ipywidgets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR")
    notebook = Console(force_jupyter=True, force_terminal=False)
    for found, live in ((None, False), (object(), True)):
        monkeypatch.setattr(progress.importlib.util, "find_spec", lambda _, found=found: found)
        assert progress.is_live(notebook) is live
    assert progress.is_live(Console(force_terminal=True))


def hang(record: RunRecord) -> None:
    report = StallReport(
        [1], [4711], 1040, "step", 5.2, "did not move", ["model.py:12 in loss"], "rank 1: ...", True
    )
    record_stall(record, report)


def test_a_worker_that_hung_is_said_once(record: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    driver = PlayedDriver(record)
    driver.scenes = [1, lambda: start(record, 0), lambda: hang(record), 1, 1, lambda: start(record, 1040), 1]
    with pytest.raises(EnvironmentFailure, match="interrupted"):
        Run(record, driver=driver).wait()
    line = "rank 1 (pid 4711, at model.py:12 in loss) did not move for 5 s after step 1,040: replaced"
    assert capsys.readouterr().out.count(line) == 1


def test_ranks_that_waited_for_each_other_are_all_named(record: RunRecord) -> None:
    report = StallReport(
        [0, 1], [7, 8], 30, "save", 20.4, "waited for each other", ["a.py:1 in f", ""], "", False
    )
    record_stall(record, report)
    assert stall_text(record.events(("stall",))[0]) == (
        "rank 0 (pid 7, at a.py:1 in f) and rank 1 (pid 8) waited for each other for 20 s after step 30 (save): "
        "left alone, as no restart is left"
    )


def test_before_there_is_room_a_run_waits_for_room(record: RunRecord, tmp_path: Path) -> None:
    spec = RunSpec(recipe=Toy(), name=record.name, storage=Storage(tmp_path), target_steps=40)
    for workers, words in ((Range(1, 4), "room for 1..4 workers"), (Range(1, 1), "room for 1 worker")):
        assert WorkersDriver(spec, record, workers, {"CPU": 1}, 0).waits_for() == words


def test_ctrl_c_leaves_no_bar_but_a_line_that_says_what_goes_on(
    record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = PlayedDriver(record)

    def train() -> None:
        start(record, 0)
        reach(record, 600, 0.875)
        reach(record, 1200, 0.75)

    driver.scenes = [1, train, 1, 1, interrupt, 1, lambda: end(record, "stopped", 1200), 1]
    with pytest.raises(KeyboardInterrupt):
        Run(record, driver=driver).wait()
    assert driver.was_stopped
    assert screen_of(capsys.readouterr().out) == [
        "stopping at the next step boundary, with a checkpoint (Ctrl-C again: at once)",
        "run digits-1: stopped at step 1,200 of 2,000; best val accuracy 0.875 at step 600; "
        "the same command goes on from step 1,200, which is committed",
    ]


def test_a_second_ctrl_c_leaves_such_a_line_too(
    record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = PlayedDriver(record)
    driver.scenes = [1, lambda: start(record, 0), 1, interrupt, 1, interrupt, 1]
    with pytest.raises(KeyboardInterrupt):
        Run(record, driver=driver).wait()
    last = (
        "run digits-1: interrupted at step 0 of 2,000; nothing was committed yet; the same command starts it"
    )
    assert screen_of(capsys.readouterr().out)[-1] == last


def test_a_run_that_finished_leaves_its_best_value(
    record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    start(record, 0)
    reach(record, 600, 0.875)
    reach(record, 2000, 0.75)
    end(record, "finished", 2000)
    run = Run(record).wait()
    last = "run digits-1: finished at step 2,000 of 2,000; best val accuracy 0.875 at step 600"
    assert screen_of(capsys.readouterr().out) == [last]
    assert "<th>best</th><td>val accuracy 0.875 at step 600</td>" in run._repr_html_()
