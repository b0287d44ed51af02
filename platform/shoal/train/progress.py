"""Live progress of a run, for a person who waits: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from shoal.tracking import RunRecord
from shoal.tracking.journal import TROUBLE
from shoal.train.stall import stall_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

PLAIN_INTERVAL_S = 5.0
"""Seconds between lines where there is no terminal."""


class Reporter(Protocol):
    """Somebody who shows how far a run or a sweep is."""

    def update(self) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """Nobody watches."""

    def update(self) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""


def is_live(console: Console) -> bool:
    """Whether rich can draw anew what stands there: on a terminal, and in a notebook that has ipywidgets."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


@contextmanager
def reporter(
    record: RunRecord,
    *,
    enabled: bool,
    last_line: Callable[[], str],
    since: int = 0,
    waits_for: Callable[[], str] | None = None,
) -> Iterator[Reporter]:
    """A reporter that fits where this process's output goes; a bar is gone on exit, and ``last_line`` stands there.

    ``since`` is where the journal ended when the run was started: what an earlier attempt reached is not shown.
    ``waits_for`` says what keeps the run from starting.
    """
    if not enabled:
        yield Silent()
        return
    from rich.console import Console

    console = Console()
    feed = _Feed(record, since, waits_for)
    if not is_live(console):
        plain = _Plain(feed, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
        yield plain
        plain.update(force=True)
        return
    from rich.progress import Progress

    progress = Progress(*_columns(), console=console, transient=True, refresh_per_second=8)
    task = progress.add_task(record.name, total=None, count="", detail=feed.detail())
    try:
        progress.start()  # in here: rich leaves the display on when Ctrl-C comes while it starts
        yield _Bar(feed, progress, task)
    finally:
        progress.stop()
        console.print(last_line(), markup=False, highlight=False, soft_wrap=True)


def _columns() -> tuple[ProgressColumn, ...]:
    """What the bar's line holds. Where it is too long, the bar alone gets shorter."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    )


class _Feed:
    """New lines of the journal, folded into what a person wants to see."""

    def __init__(self, record: RunRecord, since: int, waits_for: Callable[[], str] | None) -> None:
        self._record = record
        self._offset = since
        self._waits_for = waits_for
        self.step = 0
        self.target: int | None = None
        self.workers = 0
        self.is_resizing = False
        self.values: dict[str, float] = {}
        self.val: dict[str, float] = {}

    def news(self) -> list[str]:
        """Read what is new; returns what deserves a line of its own."""
        events, self._offset = self._record.events_since(self._offset)
        return [line for event in events if (line := self._fold(event))]

    def detail(self) -> str:
        """Loss, speed and workers in a few words; before they start, and start again, what the run waits for."""
        if self.target is None or self.is_resizing:
            what = "resizing" if self.is_resizing else "starting"
            return f"{what}: waiting for {self._waits_for()}" if self._waits_for else what
        parts = []
        if "loss" in self.values:
            parts.append(f"loss {self.values['loss']:.4g}")
        parts += [f"val {name} {value:.4g}" for name, value in self.val.items() if name != "loss"][:2]
        if "samples_per_s" in self.values:
            parts.append(f"{self.values['samples_per_s']:,.0f} samples/s")
        if self.workers:
            parts.append(_workers_text(self.workers))
        return "  ".join(parts)

    def _fold(self, event: dict[str, Any]) -> str:
        kind = event["kind"]
        if kind in ("start", "metrics", "eval", "resize", "end"):  # a checkpoint's line is of an earlier step
            self.step = event["step"]
        if kind == "start":
            self.target, self.workers = event["target_steps"], event["workers"]
            self.is_resizing = False
            self.values, self.val = {}, {}  # an earlier attempt's speed and loss say nothing about this one
            return (
                f"resumed from step {event['step']:,} on {_workers_text(self.workers)}"
                if event["step"]
                else ""
            )
        if kind == "metrics":
            self.values = event["values"]
        elif kind == "eval" and event["split"] == "val":
            self.val = event["values"]
        elif kind == "resize":
            self.is_resizing = True
            return f"committed at step {event['step']:,} to go on with {_workers_text(event['to'])}"
        elif kind == "stall":
            return stall_text(event)
        elif kind in TROUBLE:
            return f"{kind.replace('_', ' ')}: {event['message']}"
        elif kind == "rejected":
            return f"checkpoint {event['path']} does not verify ({event['reason']}); going back to the one before"
        return ""


def _workers_text(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


class _Plain:
    """Lines, a few seconds apart, for logs and files."""

    def __init__(self, feed: _Feed, say: Callable[[str], None]) -> None:
        self._feed, self.say = feed, say
        self._last = time.monotonic()
        self._shown = -1

    def update(self, *, force: bool = False) -> None:
        for line in self._feed.news():
            self.say(line)
        if force and self._feed.target is None:
            return  # it ended before it started: there is no progress to speak of
        if (force or time.monotonic() - self._last >= PLAIN_INTERVAL_S) and self._feed.step != self._shown:
            self._last, self._shown = time.monotonic(), self._feed.step
            if self._feed.target is None:
                self.say(self._feed.detail())
            else:
                self.say(f"step {self._feed.step:,}/{self._feed.target:,}  {self._feed.detail()}")


class _Bar:
    def __init__(self, feed: _Feed, progress: Any, task: Any) -> None:
        self._feed, self._progress, self._task = feed, progress, task

    def update(self) -> None:
        for line in self._feed.news():
            self.say(line)
        step, target = self._feed.step, self._feed.target
        count = "" if target is None else f"{step:,}/{target:,}"
        self._progress.update(
            self._task, completed=step, total=target, count=count, detail=self._feed.detail()
        )

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)
