"""What a person sees of a sweep: a live table where there is a terminal, plain lines elsewhere, a frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from shoal.recipe import Objective
from shoal.train.progress import Reporter, Silent, is_live
from shoal.tune.record import Trial, TrialState, best_trial

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

MAX_WIDTH = 100
MAX_ROWS = 20
"""Rows of the live table; a longer sweep shows the trials that run and the best of the others."""


class Watched(Protocol):
    """What a reporter needs of a sweep."""

    @property
    def name(self) -> str: ...
    @property
    def trials(self) -> list[Trial]: ...
    @property
    def objective(self) -> Objective: ...


@contextmanager
def reporter(sweep: Watched, num_trials: int, *, enabled: bool) -> Iterator[Reporter]:
    """A reporter that fits where this process's output goes; a table stays as the trials stand on exit."""
    if not enabled:
        yield Silent()
        return
    from rich.console import Console

    console = Console()
    if not is_live(console):
        yield Plain(
            sweep, num_trials, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
        )
        return
    from rich.live import Live

    def table() -> Table:
        return trials_table(sweep.name, sweep.trials, sweep.objective, num_trials=num_trials)

    live = Live(table(), console=console, refresh_per_second=4)
    shown = _Table(live, table)
    try:
        try:
            live.start()  # in here: rich leaves the display on when Ctrl-C comes while it starts
            yield shown
        finally:
            shown.update()
            live.stop()
    except KeyboardInterrupt:
        console.print(stopped_text(sweep, num_trials), markup=False, highlight=False, soft_wrap=True)
        raise


class _Table:
    def __init__(self, live: Any, table: Callable[[], Table]) -> None:
        self._live, self._table = live, table

    def update(self) -> None:
        self._live.update(self._table())

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)


class Plain:
    """One line when a trial begins, and one when it is done."""

    def __init__(self, sweep: Watched, num_trials: int, say: Callable[[str], None]) -> None:
        self._sweep, self._num_trials, self.say = sweep, num_trials, say
        self._shown: dict[int, TrialState] = {}

    def update(self) -> None:
        """Say what is new."""
        for trial in self._sweep.trials:
            if self._shown.get(trial.number) == trial.state or trial.state is TrialState.WAITING:
                continue
            self._shown[trial.number] = trial.state
            measured = f"  {value_text(trial, self._sweep.objective)}" if trial.value is not None else ""
            error = f"  {first_line(trial.error)}" if trial.error else ""
            total = max(self._num_trials, len(self._sweep.trials))
            self.say(
                f"trial {trial.number}/{total} {trial.state}  {fields_text(trial)}"
                f"{measured}{f'  step {trial.step:,}' if trial.step else ''}{error}"
            )


def stopped_text(sweep: Watched, num_trials: int) -> str:
    """One line on a sweep that Ctrl-C stopped: how many trials are done, and what goes on with it."""
    trials = sweep.trials
    done = sum(trial.state.is_final for trial in trials)
    running = sum(trial.state is TrialState.RUNNING for trial in trials)
    left = f", {running} left while stopping" if running else ""
    return (
        f"sweep {sweep.name}: stopped with {done} of {max(num_trials, len(trials))} trials done{left}; "
        "the same command goes on with it"
    )


def trials_table(title: str, trials: Sequence[Trial], objective: Objective, *, num_trials: int) -> Table:
    """The trials as a table at most `MAX_WIDTH` columns wide, the best one marked."""
    from rich.table import Table
    from rich.text import Text

    done = sum(trial.state.is_final for trial in trials)
    total = max(num_trials, len(trials))  # a population grows by those that replace others
    table = Table(title=f"{title}: {done} of {total} trials done", title_justify="left")
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column(objective.metric, justify="right", no_wrap=True, max_width=20)
    table.add_column("fields", overflow="ellipsis", no_wrap=True, max_width=MAX_WIDTH - 60)
    best = best_trial(trials, objective)
    for trial in shown_trials(trials, objective):
        marks = "bold" if trial is best else ("dim" if trial.state is TrialState.PRUNED else "")
        value = f"{trial.value:.4g}{' *' if trial is best else ''}" if trial.value is not None else "-"
        detail = first_line(trial.error) if trial.error else fields_text(trial)
        cells = [str(trial.number), str(trial.state), f"{trial.step:,}", value, detail]
        table.add_row(*(Text(cell) for cell in cells), style=marks)
    if hidden := len(trials) - len(shown_trials(trials, objective)):
        table.caption = f"and {hidden} more, none of them better"
    return table


def shown_trials(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """The trials a person wants to see: those under way, and the best of the others; by number."""
    if len(trials) <= MAX_ROWS:
        return list(trials)
    active = [trial for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
    others = [trial for trial in trials if trial not in active]
    best = best_trial(trials, objective)  # first: one that was stopped may have a better value, and is not it
    sign = -1.0 if objective.mode == "max" else 1.0
    others.sort(key=lambda trial: (trial is not best, trial.value is None, sign * (trial.value or 0.0)))
    return sorted((active + others)[:MAX_ROWS], key=lambda trial: trial.number)


def sweep_frame(trials: Sequence[Trial], objective: Objective) -> pd.DataFrame:
    """One row per trial; ``source`` (``<run>@<step>``) only where trials went on from others."""
    import pandas as pd

    is_population = any(trial.source for trial in trials)
    rows = []
    for trial in trials:
        values = {f"val_{name}": value for name, value in trial.values.items()}
        values.setdefault(f"val_{objective.metric}", trial.value if trial.value is not None else float("nan"))
        source = f"{trial.source.run}@{trial.source.step}" if trial.source else ""
        rows.append(
            {
                "run": trial.run,
                "state": str(trial.state),
                "step": trial.step,
                **({"source": source} if is_population else {}),
                **trial.fields,
                **values,
            }
        )
    index = pd.Index([trial.number for trial in trials], name="trial", dtype="int64")
    return pd.DataFrame(rows, index=index)


def sweep_html(name: str, trials: Sequence[Trial], objective: Objective) -> str:
    """The trials as an HTML table."""
    from html import escape

    best = best_trial(trials, objective)
    fields = list(dict.fromkeys(field for trial in trials for field in trial.fields))
    head = ["trial", "state", "step", objective.metric, *fields]
    lines = []
    for trial in trials:
        value = "" if trial.value is None else f"{trial.value:.4g}"
        cells = [str(trial.number), str(trial.state), f"{trial.step:,}", value]
        cells += [short(trial.fields.get(field, "")) for field in fields]
        tag = "th" if trial is best else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{escape(text)}</th>" for text in head)
    return f"<table><caption>{escape(name)}</caption><tr>{header}</tr>{''.join(lines)}</table>"


def fields_text(trial: Trial) -> str:
    """``lr=0.00123 hidden=64``; with where it went on from, or what took its place, in a population."""
    words = [f"{name}={short(value)}" for name, value in trial.fields.items()]
    if trial.source is not None:
        words.append(f"(from {_short_run(trial.source.run)} at step {trial.source.step:,})")
    if trial.replaced_by:
        words.append(f"(replaced by {_short_run(trial.replaced_by)})")
    return " ".join(words)


def _short_run(run: str) -> str:
    """``t003`` of ``digits-sweep-414c2e45-t003``."""
    return run.rpartition("-")[2]


def value_text(trial: Trial, objective: Objective) -> str:
    """``accuracy 0.967``."""
    return f"{objective.metric} {trial.value:.4g}"


def first_line(text: str) -> str:
    """The first line of an error."""
    return text.strip().splitlines()[0] if text.strip() else ""


def short(value: object) -> str:
    """A number with the digits a person reads, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
