"""What became of a run's time: its journal read as a timeline, and how much of the time went into steps that count.

A pure function of the journal's lines: no files, no clock, no Ray. ``docs/life-of-a-run.md`` explains the words to
a person. The run's time is cut into *spans*, each of which is one `Doing`; they follow each other without a gap or
an overlap from the first line to the last. What happened is told by *moments*, in the order of the lines.

**Goodput** is the time of useful steps divided by the wall time, both in seconds:

- *useful* is the time from an attempt's first completed step to its last, without evaluations, without what training
  stood still for checkpoints and hangs, and without steps that a later attempt had to compute again. Which steps
  those are is known by number; when they began is interpolated between the lines that name a step. The first step
  of an attempt counts as part of its start: the time of the one cannot be told from that of the other.
- *wall time* is everything from the first line to the last (or to now, for a run that goes on), also waiting for
  room, starting, recovering and resizing, but for `Doing.AWAY`: the time in which nobody drove the run, from its end
  or its driver's last sign of life until somebody asks for it again.

What the lines do not tell is never counted as useful: where no line says when a worker died, it was at the last sign
of life. Lines of kinds that this version does not know become moments and change nothing else.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from shoal.tracking.journal import Event

CLOCK_SET_BACK_S = 60.0
"""A line that is older than the one before it by more was written after somebody set the clock back: later lines are
moved on by as much. By less, two machines' clocks differ, and the line counts as of the moment of the one before."""


class Doing(StrEnum):
    """What a span of a run's time went into."""

    WAITING = "waiting"
    """For room on the cluster."""
    STARTING = "starting"
    """Processes, data, weights, up to the first completed step."""
    STEPS = "steps"
    """Steps that count."""
    REPEATED = "repeated"
    """Steps that a later attempt had to compute again."""
    EVALUATING = "evaluating"
    SAVING = "saving"
    """Training stood still for a checkpoint; what is written beside the training costs no span."""
    HANGING = "hanging"
    """A worker did not move, until that was found."""
    RECOVERING = "recovering"
    """From a worker's death, or from a step for which all begin anew, to the next completed step."""
    RESIZING = "resizing"
    """From the last step on one number of workers to the first on another."""
    ENDING = "ending"
    """From an attempt's last step to its last line: test data, the last commit."""
    AWAY = "away"
    """Nobody drove the run; no part of the wall time."""


_BEFORE_STEPS = frozenset({Doing.STARTING, Doing.RECOVERING, Doing.RESIZING})
_TRAINING = frozenset({Doing.STEPS, Doing.REPEATED, Doing.ENDING})


@dataclass(frozen=True)
class Span:
    """A stretch of a run's time; ``begin`` and ``end`` are epoch seconds."""

    doing: Doing
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Something that happened to a run."""

    t: float
    """Epoch seconds of its beginning."""
    kind: str
    """The journal's kind of line; ``recovery`` for the way from a death, or from a step for which all begin anew, to
    the next step, and ``vanished`` for an attempt that ends without a line that says so."""
    attempt: int
    """Number of the attempt under way, from 1; 0 before the first."""
    seconds: float | None = None
    """How long it took; None where that means nothing, or is not known."""
    step: int | None = None
    workers: int | None = None
    """How many train after it."""
    steps_lost: int | None = None
    """Steps that were computed again because of it, as far as the lines tell; None where that means nothing."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A run's time and what happened in it."""

    spans: tuple[Span, ...]
    moments: tuple[Moment, ...]
    steps_lost: int
    """Steps that were computed more than once, as far as the lines tell."""

    @property
    def begin(self) -> float | None:
        """Epoch seconds of the first line; None for a run without lines."""
        return self.spans[0].begin if self.spans else None

    @property
    def end(self) -> float | None:
        """Where the last span ends, in epoch seconds."""
        return self.spans[-1].end if self.spans else None

    @property
    def seconds(self) -> dict[Doing, float]:
        """Seconds by what they went into, all of them."""
        total = dict.fromkeys(Doing, 0.0)
        for span in self.spans:
            total[span.doing] += span.seconds
        return total

    @property
    def wall_s(self) -> float:
        """Seconds in which somebody drove the run."""
        return sum(span.seconds for span in self.spans if span.doing is not Doing.AWAY)

    @property
    def useful_s(self) -> float:
        """Seconds of steps that count."""
        return self.seconds[Doing.STEPS]

    @property
    def goodput(self) -> float | None:
        """``useful_s / wall_s``, from 0 to 1; None before any time has passed."""
        wall_s = self.wall_s
        return min(1.0, self.useful_s / wall_s) if wall_s > 0 else None

    @property
    def recoveries_s(self) -> tuple[float, ...]:
        """Of each death that the run went on from: seconds to the next completed step."""
        return tuple(m.seconds for m in self.moments if m.kind == "recovery" and m.seconds is not None)

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of moment happened."""
        return dict(Counter(moment.kind for moment in self.moments))

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it: totals, spans and moments."""
        return {
            "goodput": self.goodput,
            "wall_s": self.wall_s,
            "steps_lost": self.steps_lost,
            "recoveries_s": list(self.recoveries_s),
            "counts": self.counts,
            "seconds": {doing.value: seconds for doing, seconds in self.seconds.items() if seconds},
            "spans": [
                {"doing": span.doing.value, "begin": span.begin, "end": span.end} for span in self.spans
            ],
            "moments": [
                {
                    "t": m.t,
                    "kind": m.kind,
                    "attempt": m.attempt,
                    "seconds": m.seconds,
                    "step": m.step,
                    "workers": m.workers,
                    "steps_lost": m.steps_lost,
                    "detail": m.detail,
                }
                for m in self.moments
            ],
        }


def timeline_of(events: Iterable[Event], *, until: float | None = None) -> Timeline:
    """The timeline of the lines of one run's journal, in their order.

    ``until`` (epoch seconds) is now, for a run that somebody drives; None for one that nobody does, whose time
    ends with its last line. Lines without a time are left out.
    """
    reader = _Reader()
    for t, event in _in_order(events):
        reader.read(t, event)
    return reader.finish(until)


def _in_order(events: Iterable[Event]) -> Iterator[tuple[float, Event]]:
    """The lines with times that never go back; see `CLOCK_SET_BACK_S`."""
    latest, shift = -math.inf, 0.0
    for event in events:
        t = _number(event, "t")
        if t is None:
            continue
        if t + shift < latest - CLOCK_SET_BACK_S:
            shift = latest - t
        latest = max(latest, t + shift)
        yield latest, event


@dataclass
class _Leg:
    """A stretch of one attempt in which steps only went up."""

    first: int
    """Steps done where it began."""
    marks: list[tuple[float, int]] = field(default_factory=list)
    """Moments and how many steps were done by then, both growing."""

    @property
    def last(self) -> int:
        return self.marks[-1][1] if self.marks else self.first

    def mark(self, t: float, step: int) -> None:
        """Note that ``step`` steps were done at ``t``; what is not news is passed over."""
        if step > self.last or not self.marks:
            self.marks.append((max(t, self.marks[-1][0]) if self.marks else t, max(step, self.last)))

    def reached(self, step: int) -> float:
        """When so many steps were done, between two marks in proportion."""
        index = bisect_right([done for _, done in self.marks], step)
        if index == 0:
            return self.marks[0][0]
        (t0, done0), (t1, done1) = self.marks[index - 1], self.marks[min(index, len(self.marks) - 1)]
        return t0 if done1 == done0 else t0 + (t1 - t0) * (step - done0) / (done1 - done0)


@dataclass
class _Base:
    """A span before it is cut, and the leg whose steps it holds."""

    doing: Doing
    begin: float
    end: float
    leg: _Leg | None = None


@dataclass(frozen=True)
class _Overlay:
    """A stretch that is known by its own line, and which spans it may be cut out of."""

    doing: Doing
    begin: float
    end: float
    over: frozenset[Doing]


class _Reader:
    """Follows a run line by line: what it does now, and since when."""

    def __init__(self) -> None:
        self._doing = Doing.STARTING
        self._since: float | None = None
        """Where the span under way began; None before the first line."""
        self._alive = 0.0
        """The last sign of life."""
        self._latest = 0.0
        self._bases: list[_Base] = []
        self._overlays: list[_Overlay] = []
        self._legs: list[_Leg] = []
        self._leg: _Leg | None = None
        """The leg of the attempt under way; None while none trains."""
        self._started: float | None = None
        """When the attempt under way began, until its first step is known."""
        self._moments: list[Moment] = []
        self._attempt = 0
        self._workers: int | None = None
        self._pids: list[Any] = []
        self._trouble: float | None = None
        """When what the run now recovers from began."""
        self._open: list[int] = []
        """Moments whose end is the next completed step."""

    def read(self, t: float, event: Event) -> None:
        """Account for one more line."""
        if self._since is None:
            self._since = self._alive = t
        self._latest = t
        kind = event["kind"]
        read = {
            "driver": self._driver,
            "grant": self._grant,
            "start": self._start,
            "first_step": self._first_step,
            "metrics": self._metrics,
            "eval": self._eval,
            "checkpoint": self._checkpoint,
            "stall": self._stall,
            "bad_step": self._bad_step,
            "out_of_memory": self._bad_step,
            "lost": self._lost,
            "resize": self._resize,
            "end": self._end,
        }.get(kind)
        if read is None:
            self._say(t, kind, step=_whole(event, "step"), detail=_text_of(event))
        else:
            read(t, event)

    # -- one kind of line each -----------------------------------------------------------------------

    def _driver(self, t: float, event: Event) -> None:
        self._vanish()
        self._turn(self._alive, Doing.AWAY)
        self._turn(t, Doing.STARTING)
        self._trouble, self._open = None, []  # it does not go on by itself: somebody asked
        self._alive = t
        wanted = event.get("workers", "")
        self._say(t, "driver", detail=f"{wanted} workers wanted by pid {event.get('pid', '?')}")

    def _grant(self, t: float, event: Event) -> None:
        self._lay(Doing.WAITING, t - (_number(event, "seconds") or 0.0), t, over=_BEFORE_STEPS)
        self._alive = t  # no moment of its own: each start has one

    def _start(self, t: float, event: Event) -> None:
        if self._leg is not None:
            self._vanish()
        elif self._doing is Doing.AWAY:
            self._turn(t, Doing.STARTING)
        step = _whole(event, "step") or 0
        lost = self._steps_lost_at(step)
        self._attempt += 1
        self._workers = _whole(event, "workers")
        pids = event.get("pids")
        self._pids = pids if isinstance(pids, list) else []
        if self._trouble is not None:
            self._open.append(len(self._moments))
            self._say(self._trouble, "recovery", step=step, steps_lost=lost)
        self._trouble = None
        for index in self._open:
            moment = self._moments[index]
            self._moments[index] = replace(moment, attempt=self._attempt, workers=self._workers)
        self._open.append(len(self._moments))
        detail = _START_WORDS.get(str(event.get("source")), str(event.get("source", "")))
        self._say(t, "start", step=step, steps_lost=lost, detail=detail)
        self._begin_leg(step)
        self._started = self._alive = t

    def _first_step(self, t: float, event: Event) -> None:
        step = _whole(event, "step")
        if self._leg is None or step is None:
            return
        self._begin_steps(t, step)
        self._alive = t

    def _metrics(self, t: float, event: Event) -> None:
        step = _whole(event, "step")
        if self._leg is not None and step is not None and step < self._leg.last:
            self._go_back(t, step)
        self._mark(t, step)
        self._alive = t

    def _eval(self, t: float, event: Event) -> None:
        began = t - (_number(event, "seconds") or 0.0)
        self._mark(began, _whole(event, "step"))
        self._lay(Doing.EVALUATING, began, t, over=_TRAINING)
        self._alive = t

    def _checkpoint(self, t: float, event: Event) -> None:
        seconds, pause_s = _number(event, "seconds") or 0.0, _number(event, "pause_s") or 0.0
        step = _whole(event, "step")
        if seconds > 0:  # else its line is written by who found it: no sign of the attempt that made it
            written_from = t - seconds
            self._mark(written_from - pause_s, step)
            self._lay(Doing.SAVING, written_from - pause_s, written_from, over=_TRAINING)
            self._alive = t
        size = _number(event, "size_bytes") or 0.0
        found = "" if seconds > 0 else ", found by the attempt that goes on from it"
        paused = f", training stood still for {pause_s * 1000:.1f} ms" if pause_s else ""
        self._say(
            t - seconds,
            "checkpoint",
            step=step,
            seconds=seconds if seconds > 0 else None,
            detail=f"{size / 2**20:.1f} MiB{found}{paused}",
        )

    def _stall(self, t: float, event: Event) -> None:
        began = t - (_number(event, "seconds") or 0.0)
        step = _whole(event, "step")
        self._mark(began, step)
        self._lay(Doing.HANGING, began, t, over=_TRAINING)
        if event.get("replaced"):
            self._trouble = max(began, self._since or began)
        self._alive = t
        self._say(
            began,
            "stall",
            step=step,
            seconds=_number(event, "seconds"),
            detail=f"{self._ranks_text(event)} {event.get('why', '')}".strip(),
        )

    def _bad_step(self, t: float, event: Event) -> None:
        """A step that was not taken; after some of them every rank begins anew, in its process."""
        self._say(t, event["kind"], step=_whole(event, "step"), detail=_text_of(event))
        begins_anew = event["kind"] == "out_of_memory" or event.get("action") == "rollback"
        if begins_anew and self._leg is not None:
            self._recover(t)
        self._alive = t

    def _lost(self, t: float, event: Event) -> None:
        step = _whole(event, "step")
        self._mark(t, step)
        self._say(t, "lost", step=step, detail=self._ranks_text(event))
        if self._doing is Doing.AWAY:
            return  # nobody needs it any more
        self._recover(t)
        self._alive = t

    def _recover(self, t: float) -> None:
        """From here on the run is on its way back; what went wrong first counts as the beginning."""
        if self._trouble is None:
            self._trouble = t
        self._close_leg(t, Doing.RECOVERING)

    def _resize(self, t: float, event: Event) -> None:
        step = _whole(event, "step")
        self._mark(t, step)
        left = self._leg.marks[-1][0] if self._leg is not None and self._leg.marks else t
        self._close_leg(left, Doing.RESIZING)
        self._open.append(len(self._moments))
        detail = f"from {event.get('from')} to {event.get('to')} workers"
        self._say(left, "resize", step=step, detail=detail)
        self._alive = t

    def _end(self, t: float, event: Event) -> None:
        step, state = _whole(event, "step"), str(event.get("state", ""))
        self._mark(t, step)
        if self._leg is not None and self._leg.marks and state != "failed":
            self._close_leg(self._leg.marks[-1][0], Doing.ENDING)
        self._close_leg(t, Doing.AWAY)
        self._trouble, self._open = None, []
        self._alive = t
        error = str(event.get("error") or "").strip().split("\n")[0]
        self._say(t, "end", step=step, detail=f"{state}{': ' if error else ''}{error}")

    # -- what they are made of -----------------------------------------------------------------------

    def _turn(self, t: float, doing: Doing) -> None:
        """From ``t`` on the run does something else."""
        assert self._since is not None
        t = max(t, self._since)
        self._bases.append(_Base(self._doing, self._since, t, self._leg))
        self._since, self._doing = t, doing

    def _lay(self, doing: Doing, begin: float, end: float, *, over: frozenset[Doing]) -> None:
        """Cut a stretch out of the span under way; never out of an earlier one."""
        assert self._since is not None
        begin = max(begin, self._since)
        if end > begin:
            self._overlays.append(_Overlay(doing, begin, end, over))

    def _begin_leg(self, step: int) -> None:
        self._leg = _Leg(step)
        self._legs.append(self._leg)

    def _begin_steps(self, t: float, step: int) -> None:
        """The attempt's first step was complete at ``t``, as the ``step``th of the run."""
        assert self._leg is not None
        if self._started is None:
            return
        self._started = None
        self._turn(t, Doing.STEPS)
        self._leg.mark(self._since or t, step)
        for index in self._open:
            moment = self._moments[index]
            self._moments[index] = replace(moment, seconds=max(0.0, t - moment.t))
        self._open = []

    def _mark(self, t: float, step: int | None) -> None:
        """Note that an attempt had come to a step at ``t``."""
        leg = self._leg
        if leg is None or step is None:
            return
        if self._started is not None and step > leg.first:  # a journal that names no first steps
            self._begin_steps(self._started, leg.first)
        if self._started is not None:
            return
        leg.mark(max(t, self._since or t), step)

    def _go_back(self, t: float, step: int) -> None:
        """The attempt went back to an earlier step and on from it; what lies between was for nothing."""
        if self._leg is None or not self._leg.marks:
            return
        self._turn(self._leg.marks[-1][0], Doing.REPEATED)
        self._turn(t, Doing.STEPS)
        self._begin_leg(step)

    def _close_leg(self, t: float, doing: Doing) -> None:
        """The attempt under way is over as of ``t``, or was before."""
        self._turn(t, doing)
        self._leg, self._started = None, None

    def _vanish(self) -> None:
        """An attempt ended without a line: as of the last sign of life."""
        if self._leg is None:
            return
        step = self._leg.last
        self._say(self._alive, "vanished", step=step, detail="no sign of life after this")
        self._close_leg(self._alive, Doing.RECOVERING)
        if self._trouble is None:
            self._trouble = self._alive

    def _steps_lost_at(self, step: int) -> int:
        """How many steps of the attempt before are computed again by one that begins at ``step``."""
        if not self._legs:
            return 0
        before = self._legs[-1]
        if step > before.last and before.marks:
            # The survivors committed more than any line had named; they did it before the attempt was over.
            before.mark(next(base.end for base in reversed(self._bases) if base.leg is before), step)
        return max(0, before.last - step)

    def _ranks_text(self, event: Event) -> str:
        ranks = event.get("ranks")
        if not isinstance(ranks, list) or not ranks:
            return str(event.get("why", ""))
        named = [
            f"rank {rank} (pid {self._pids[rank]})"
            if isinstance(rank, int) and 0 <= rank < len(self._pids)
            else f"rank {rank}"
            for rank in ranks
        ]
        return " and ".join(named)

    def _say(self, t: float, kind: str, **facts: Any) -> None:
        self._moments.append(
            Moment(
                t=t,
                kind=kind,
                attempt=self._attempt,
                workers=self._workers,
                **facts,
            )
        )

    # -- the result ----------------------------------------------------------------------------------

    def finish(self, until: float | None) -> Timeline:
        """What was read, cut into spans."""
        if self._since is None:
            return Timeline(spans=(), moments=(), steps_lost=0)
        is_over = self._doing is Doing.AWAY
        if not is_over:
            if until is None and self._leg is not None:
                step = self._leg.last
                self._say(self._latest, "vanished", step=step, detail="no sign of life after this")
            self._turn(max(self._latest, until if until is not None else self._latest), Doing.AWAY)
        return Timeline(
            spans=tuple(_joined(_cut(_with_repeated(self._bases, self._legs), self._overlays))),
            moments=tuple(self._moments),
            steps_lost=sum(
                max(0, leg.last - later.first) for leg, later in zip(self._legs, self._legs[1:], strict=False)
            ),
        )


def _with_repeated(bases: list[_Base], legs: list[_Leg]) -> Iterator[Span]:
    """The spans; of steps those that a later leg began before are cut off as repeated."""
    floors: dict[int, float] = {}
    floor = math.inf
    for leg in reversed(legs):
        floors[id(leg)] = floor
        floor = min(floor, leg.first)
    for base in bases:
        cut = base.end
        if base.doing is Doing.STEPS and base.leg is not None and base.leg.last > floors[id(base.leg)]:
            cut = min(max(base.leg.reached(int(floors[id(base.leg)])), base.begin), base.end)
        yield Span(base.doing, base.begin, cut)
        yield Span(Doing.REPEATED, cut, base.end)


def _cut(spans: Iterable[Span], overlays: list[_Overlay]) -> Iterator[Span]:
    """The spans with the overlays cut out of them where they may be; none is empty, none overlaps another."""
    laid = sorted(overlays, key=lambda overlay: overlay.begin)
    first = 0
    for span in spans:
        at, index = span.begin, first
        while index < len(laid) and laid[index].begin < span.end:
            overlay = laid[index]
            begin, end = max(overlay.begin, at), min(overlay.end, span.end)
            if end > begin and span.doing in overlay.over:
                if begin > at:
                    yield Span(span.doing, at, begin)
                yield Span(overlay.doing, begin, end)
                at = end
            index += 1
        if span.end > at:
            yield Span(span.doing, at, span.end)
        while first < len(laid) and laid[first].end <= span.end:
            first += 1


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Neighbours that are the same doing as one span."""
    last: Span | None = None
    for span in spans:
        if last is not None and last.doing is span.doing:
            last = Span(span.doing, last.begin, span.end)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


_START_WORDS = {
    "fresh": "from the beginning",
    "checkpoint": "from its checkpoint",
    "init_from": "from a model's weights",
    "adopted": "from another run's checkpoint",
}


def _text_of(event: Event) -> str:
    """What a line of a kind that is only shown says: its message, else its fields."""
    for name in ("message", "reason", "error"):
        if isinstance(event.get(name), str):
            return str(event[name]).strip().split("\n")[0]
    return " ".join(
        f"{name}={value}" for name, value in event.items() if name not in ("t", "kind", "attempt", "step")
    )


def _number(event: Event, name: str) -> float | None:
    """A finite number of a line, else None: another version may mean something else by the name."""
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(event: Event, name: str) -> int | None:
    value = event.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
