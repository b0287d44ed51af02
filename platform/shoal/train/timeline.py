"""A run's timeline for people: a frame, a plot, a table; ``shoal.tracking.timeline`` says what is in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.tracking import Doing, Moment, RunRecord, Timeline, timeline_of
from shoal.train.plots import new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_DETAIL = 160
"""Characters of a moment's detail in a table."""


class Row(NamedTuple):
    """A line of the table, as text; empty where there is nothing to say."""

    time: str
    what: str
    took: str
    step: str
    workers: str
    lost: str
    detail: str


@dataclass(frozen=True, kw_only=True, repr=False)
class RunTimeline(Timeline):
    """What happened to a run, and what its time went into: `goodput`, `seconds`, `recoveries_s`, `steps_lost`."""

    name: str

    def frame(self) -> pd.DataFrame:
        """One row per moment: ``time`` (UTC), ``kind``, ``attempt``, ``seconds``, ``step``, ``workers``,
        ``steps_lost``, ``detail``; cells that mean nothing are missing."""
        import pandas as pd

        return pd.DataFrame(
            {
                "time": pd.to_datetime([m.t for m in self.moments], unit="s", utc=True),
                "kind": pd.array([m.kind for m in self.moments], dtype="string"),
                "attempt": pd.array([m.attempt for m in self.moments], dtype="int64"),
                "seconds": pd.array([m.seconds for m in self.moments], dtype="Float64"),
                "step": pd.array([m.step for m in self.moments], dtype="Int64"),
                "workers": pd.array([m.workers for m in self.moments], dtype="Int64"),
                "steps_lost": pd.array([m.steps_lost for m in self.moments], dtype="Int64"),
                "detail": pd.array([m.detail for m in self.moments], dtype="string"),
            }
        )

    def spans_frame(self) -> pd.DataFrame:
        """One row per span: ``doing``, ``begin`` (UTC), ``seconds``; they follow each other without a gap."""
        import pandas as pd

        return pd.DataFrame(
            {
                "doing": pd.array([span.doing.value for span in self.spans], dtype="string"),
                "begin": pd.to_datetime([span.begin for span in self.spans], unit="s", utc=True),
                "seconds": pd.array([span.seconds for span in self.spans], dtype="float64"),
            }
        )

    def plot(self) -> Figure:
        """What the run did over time, a lane for each doing; deaths, hangs and resizes are marked."""
        begin = self.begin or 0.0
        lanes = [doing for doing, seconds in self.seconds.items() if seconds > 0]
        figure = new_figure(figsize=(9.0, 1.3 + 0.32 * max(1, len(lanes))))
        axes = figure.subplots()
        for lane, doing in enumerate(lanes):
            bars = [(span.begin - begin, span.seconds) for span in self.spans if span.doing is doing]
            axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors="C2" if doing is Doing.STEPS else "C1")
        for kind, color in (("lost", "C3"), ("vanished", "C3"), ("stall", "C4"), ("resize", "C0")):
            times = [moment.t - begin for moment in self.moments if moment.kind == kind]
            if times:
                axes.plot(times, [-0.9] * len(times), "|", color=color, markersize=9, label=kind)
        axes.set_yticks(range(len(lanes)), [doing.value for doing in lanes])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.set_title(f"{self.name}: {goodput_text(self)}", fontsize="medium")
        axes.grid(alpha=0.3, axis="x")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right", fontsize="small", ncols=4)
        return figure

    def __repr__(self) -> str:
        return f"RunTimeline({self.name!r}, {goodput_text(self)}, {troubles_text(self)})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in Row._fields)
        lines = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows_of(self)
        )
        caption = escape(f"{self.name}: {goodput_text(self)}, {troubles_text(self)}")
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{lines}</table>"


def read_timeline(record: RunRecord, *, now: float | None = None) -> RunTimeline:
    """The timeline of a run as far as its record goes; up to ``now`` (epoch seconds) while somebody drives it."""
    is_driven = record.is_locked()  # first: a run that ends meanwhile must not pass for one that vanished
    until = (time.time() if now is None else now) if is_driven else None
    found = timeline_of(record.iter_events(), until=until)
    return RunTimeline(
        name=record.name, spans=found.spans, moments=found.moments, steps_lost=found.steps_lost
    )


def goodput_text(timeline: Timeline) -> str:
    """``goodput 93.1 % (111 s of steps that count in 119 s)``."""
    goodput = timeline.goodput
    if goodput is None:
        return "goodput not known yet"
    useful, wall = (seconds_text(seconds) for seconds in (timeline.useful_s, timeline.wall_s))
    return f"goodput {goodput:.1%} ({useful} of steps that count in {wall})".replace("%", " %", 1)


def troubles_text(timeline: Timeline) -> str:
    """``2 recoveries (median 0.35 s, longest 0.41 s), 0 steps lost``."""
    recoveries = timeline.recoveries_s
    text = f"{len(recoveries)} recover{'y' if len(recoveries) == 1 else 'ies'}"
    if recoveries:
        text += f" (median {seconds_text(statistics.median(recoveries))}, longest {seconds_text(max(recoveries))})"
    return f"{text}, {timeline.steps_lost:,} step{'' if timeline.steps_lost == 1 else 's'} lost"


def seconds_by_doing_text(timeline: Timeline) -> str:
    """``steps 111 s, recovering 0.76 s``, the longest first."""
    spent = sorted(timeline.seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{doing.value} {seconds_text(seconds)}" for doing, seconds in spent if seconds > 0)


def seconds_text(seconds: float) -> str:
    """A duration with the digits a person reads: ``1.2 ms``, ``0.35 s``, ``111 s``, ``2:05:07``."""
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def rows_of(timeline: Timeline) -> list[Row]:
    """The moments as rows of text; checkpoints that follow each other are one row."""
    return [_row(moment) for moment in _folded(timeline.moments)]


def _folded(moments: Sequence[Moment]) -> Iterator[Moment]:
    run: list[Moment] = []
    for moment in moments:
        if moment.kind == "checkpoint":
            run.append(moment)
            continue
        yield from _as_one(run)
        run = []
        yield moment
    yield from _as_one(run)


def _as_one(checkpoints: list[Moment]) -> Iterator[Moment]:
    if len(checkpoints) < 3:
        yield from checkpoints
        return
    written_s = [moment.seconds for moment in checkpoints if moment.seconds is not None]
    mean_s = statistics.fmean(written_s or [0.0])
    steps = [moment.step for moment in checkpoints if moment.step is not None]
    where = f" from step {steps[0]:,}" if steps else ""
    yield replace(
        checkpoints[-1],
        t=checkpoints[0].t,
        seconds=mean_s,
        detail=f"{len(checkpoints):,} of them{where} on, {seconds_text(mean_s)} each beside the training",
    )


def _row(moment: Moment) -> Row:
    return Row(
        time=time.strftime("%H:%M:%S", time.localtime(moment.t)),
        what=moment.kind.replace("_", " "),
        took="" if moment.seconds is None else seconds_text(moment.seconds),
        step="" if moment.step is None else f"{moment.step:,}",
        workers="" if moment.workers is None else str(moment.workers),
        lost="" if moment.steps_lost is None else f"{moment.steps_lost:,}",
        detail=_short(moment.detail),
    )


def _short(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else f"{text[: MAX_DETAIL - 1]}…"


def as_json(timeline: RunTimeline) -> dict[str, Any]:
    """All of it, with the run's name."""
    return {"run": timeline.name, **timeline.as_dict()}
