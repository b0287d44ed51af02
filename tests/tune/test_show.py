"""What a person sees of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from rich.console import Console
from rich.live import Live

import shoal
from shoal.recipe import Objective
from shoal.tune.record import Trial, TrialState
from shoal.tune.show import MAX_ROWS, Plain, reporter, shown_trials, sweep_html, trials_table
from shoal.tune.sweep import best_of
from terminal import screen_of

BEST = shoal.maximize("accuracy")


def trial(number: int, state: TrialState = TrialState.FINISHED, value: float | None = None) -> Trial:
    fields = {"lr": 0.00123456, "hidden": 128, "a_field_with_a_long_name": "x" * 80}
    return Trial(number=number, run=f"s-t{number:03d}", fields=fields, state=state, value=value, step=1200)


def text_of(trials: list[Trial]) -> str:
    console = Console(width=100, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(trials_table("digits-sweep-12345678", trials, BEST, num_trials=16))
    return capture.get()


def test_the_table_fits_a_hundred_columns() -> None:
    trials = [
        trial(1, value=0.5),
        trial(2, value=0.75),
        replace(trial(3, TrialState.FAILED), error="boom\nmore"),
    ]
    text = text_of(trials)
    assert max(map(len, text.splitlines())) <= 100
    assert "3 of 16 trials done" in text
    assert "0.75 *" in text
    assert "0.5 *" not in text
    assert "lr=0.00123 hidden=128" in text
    assert "boom" in text
    assert "more" not in text


def test_a_long_sweep_shows_what_runs_and_the_best() -> None:
    trials = [trial(number, value=number / 100) for number in range(1, 41)] + [trial(41, TrialState.RUNNING)]
    shown = [one.number for one in shown_trials(trials, BEST)]
    assert len(shown) == MAX_ROWS
    assert shown == [*range(22, 41), 41]
    assert "and 21 more" in text_of(trials)


def test_the_starred_row_is_the_best_of_the_sweep() -> None:
    trials = [
        trial(1, value=0.5),
        trial(2, TrialState.RUNNING, 0.75),
        *(trial(number, TrialState.STOPPED, 0.9) for number in range(3, 3 + MAX_ROWS)),
    ]
    best = best_of("s", trials, BEST)
    assert best.number == 1
    assert [line.split()[1] for line in text_of(trials).splitlines() if "*" in line] == ["1"]
    assert "<th>1</th>" in sweep_html("s", trials, BEST)
    assert "<th>2</th>" not in sweep_html("s", trials, BEST)


@dataclass
class FakeSweep:
    trials: list[Trial] = field(default_factory=list)
    name: str = "s"
    objective: Objective = BEST


def test_plain_lines_say_each_change_once() -> None:
    said: list[str] = []
    sweep = FakeSweep([trial(1, TrialState.RUNNING), trial(2, TrialState.WAITING)])
    plain = Plain(sweep, 2, said.append)
    plain.update()
    plain.update()
    sweep.trials[0] = trial(1, value=0.9375)
    plain.update()
    assert len(said) == 2
    assert said[0].startswith("trial 1/2 running  lr=0.00123 hidden=128")
    assert "accuracy 0.9375  step 1,200" in said[1]


def test_ctrl_c_leaves_the_trials_as_they_stand_and_what_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    sweep = FakeSweep([trial(1, value=0.5), trial(2, TrialState.RUNNING)])

    def stop() -> None:
        with reporter(sweep, 16, enabled=True) as report:
            report.update()
            sweep.trials[1] = trial(2, TrialState.STOPPED)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    screen = screen_of(capsys.readouterr().out)
    assert screen[0] == "s: 1 of 16 trials done"
    rows = [line for line in screen if "hidden=128" in line]
    assert [state in row for state, row in zip(("finished", "stopped"), rows, strict=True)] == [True, True]
    assert screen[-1] == "sweep s: stopped with 1 of 16 trials done; the same command goes on with it"


def test_ctrl_c_while_the_table_appears_leaves_it_above_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    refresh = Live.refresh

    def refresh_and_interrupt(live: Live) -> None:
        refresh(live)
        monkeypatch.setattr(Live, "refresh", refresh)
        raise KeyboardInterrupt

    monkeypatch.setattr(Live, "refresh", refresh_and_interrupt)
    with pytest.raises(KeyboardInterrupt), reporter(FakeSweep([trial(1)]), 16, enabled=True):
        pass
    screen = screen_of(capsys.readouterr().out)
    assert screen[0] == "s: 1 of 16 trials done"
    assert screen[-1].startswith("sweep s: stopped with 1 of 16 trials done")
