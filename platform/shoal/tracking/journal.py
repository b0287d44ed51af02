"""What the lines of a run's journal mean: parsing, the state of the run, its metrics. No files here.

``docs/design.md`` lists the kinds of line and their fields. A line is one JSON object; numbers that JSON
lacks (NaN, infinities) are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` inside
``values``, and read back as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from shoal.errors import InternalError
from shoal.recipe import Objective

if TYPE_CHECKING:
    import pandas as pd

Event = dict[str, Any]
"""One journal line."""

TROUBLE = frozenset({"warning", "bad_step", "disk_full", "out_of_memory", "quarantined"})
"""What somebody should read, in the line's ``message``."""
TIMES = frozenset({"driver", "grant", "first_step", "lost"})
"""What only a timeline needs."""
KINDS = TROUBLE | TIMES | {"start", "metrics", "eval", "checkpoint", "rejected", "stall", "resize", "end"}
_MAX_TEXT = 40_000
"""Characters of a text; a line has at most a megabyte, and a character takes up to 12 bytes of JSON."""
END_STATES = frozenset({"finished", "stopped", "failed"})


class RunState(StrEnum):
    """Where a run stands."""

    NEW = "new"
    """It has an identity and has not started."""
    RUNNING = "running"
    FINISHED = "finished"
    """It reached its target step."""
    STOPPED = "stopped"
    """Someone asked it to stop; the same command goes on with it."""
    FAILED = "failed"
    """Its own code, or something that was retried too often, raised an error."""
    INTERRUPTED = "interrupted"
    """It started, did not end, and nobody holds its lock: its process was killed."""


@dataclass
class JournalSummary:
    """What a journal says in one pass; ``add`` its events in order, as they come.

    Memory does not grow with the journal.
    """

    attempt: int = 0
    """Number of ``start`` lines; 0 before the first."""
    step: int = 0
    """The last step boundary seen; goes back when an attempt resumes from an earlier checkpoint."""
    target_steps: int | None = None
    workers: int | None = None
    started: float | None = None
    """Epoch seconds of the first ``start``; ``None`` before it."""
    updated: float | None = None
    """Epoch seconds of the last line of any kind."""
    ended: Event | None = None
    """The ``end`` line, unless a later attempt started."""
    resize: Event | None = None
    """The ``resize`` line, unless a later attempt started: the run is on its way to another number of workers."""
    evals: dict[str, Event] = field(default_factory=dict)
    """The last ``eval`` line by split."""

    def add(self, event: Event) -> None:
        """Account for one more line. Unknown kinds only move ``updated``."""
        kind = event["kind"]
        self.updated = event.get("t", self.updated)
        if kind == "start":
            self.attempt += 1
            self.ended = self.resize = None
            self.target_steps = event.get("target_steps", self.target_steps)
            self.workers = event.get("workers", self.workers)
            if self.started is None:
                self.started = event.get("t")
        elif kind == "end":
            self.ended = event
        elif kind == "resize":
            self.resize = event
        elif kind == "eval":
            self.evals[event["split"]] = event
        if kind in ("start", "metrics", "eval", "resize", "end") and isinstance(event.get("step"), int):
            self.step = event["step"]

    def state(self, *, is_locked: bool) -> RunState:
        """The state of the run, given whether some process holds its lock.

        The last ``start`` or ``end`` line decides; the lock only tells a running run from one that was killed.
        """
        if self.ended is not None:
            return RunState(self.ended["state"])
        if is_locked:
            return RunState.RUNNING
        return RunState.INTERRUPTED if self.attempt else RunState.NEW


def encode(kind: str, *, t: float, attempt: int, fields: Mapping[str, Any]) -> str:
    """The journal line, without its newline.

    Raises:
        InternalError: an unknown kind, a field that is reserved or that JSON cannot hold.
    """
    if kind not in KINDS or (kind == "end" and fields.get("state") not in END_STATES):
        raise InternalError(f"no such journal line: kind {kind!r}, state {fields.get('state')!r}")
    if reserved := {"t", "kind", "attempt"} & fields.keys():
        raise InternalError(f"journal fields {sorted(reserved)} are set by the journal itself")
    line: Event = {"t": t, "kind": kind, "attempt": attempt, **fields}
    for name in ("error", "traceback", "message", "reason"):
        if isinstance(line.get(name), str):
            line[name] = line[name][-_MAX_TEXT:]  # the end of a traceback says what went wrong
    if "values" in line:
        line["values"] = {str(name): _to_json(value) for name, value in line["values"].items()}
    try:
        return json.dumps(line, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InternalError(f"journal line {kind!r} cannot be written as JSON: {error}") from error


def parse(line: bytes) -> Event | None:
    """The event of one line, or ``None`` when the line is not a journal line (torn, or damaged)."""
    try:
        event = json.loads(line)
        if not isinstance(event["kind"], str):
            return None
        if event["kind"] == "end" and event["state"] not in END_STATES:
            return None
        if event["kind"] in ("metrics", "eval", "checkpoint", "resize") and not isinstance(
            event["step"], int
        ):
            return None
        if event["kind"] == "resize" and not (
            isinstance(event["from"], int) and isinstance(event["to"], int)
        ):
            return None
        if event["kind"] == "eval" and not isinstance(event["split"], str):
            return None
        if "values" in event or event["kind"] in ("metrics", "eval"):
            event["values"] = {name: float(value) for name, value in event["values"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return dict(event)


def metric_columns(event: Event) -> dict[str, float]:
    """The metrics of one ``metrics`` or ``eval`` line under the names users see; empty for other kinds."""
    if event["kind"] == "metrics":
        return dict(event["values"])
    if event["kind"] == "eval":
        return {f"{event['split']}_{name}": value for name, value in event["values"].items()}
    return {}


def metrics_frame(events: Iterable[Event]) -> pd.DataFrame:
    """One row per step, one column per metric; evaluation metrics are called ``val_...`` and ``test_...``.

    Where a resumed run repeats a step, the later line wins. Cells that were never logged are NaN.
    """
    import pandas as pd

    rows: dict[int, dict[str, float]] = {}
    columns: dict[str, None] = {}
    for event in events:
        if values := metric_columns(event):
            rows.setdefault(event["step"], {}).update(values)
            columns.update(dict.fromkeys(values))
    order = sorted(columns, key=lambda name: (name.startswith("test_"), name.startswith("val_")))
    steps = sorted(rows)
    index = pd.Index(steps, name="step", dtype="int64")
    return pd.DataFrame([rows[step] for step in steps], index=index, columns=order, dtype="float64")


def best_by(candidates: Iterable[Event], objective: Objective) -> Event | None:
    """The line whose values are best by ``objective``; the earliest step among equals, None if none has it.

    NaN is never best. A later line of the same step replaces the earlier.
    """
    by_step = {event["step"]: event for event in candidates}
    best: Event | None = None
    best_value: float | None = None
    for _, event in sorted(by_step.items()):
        value = event.get("values", {}).get(objective.metric, math.nan)
        if objective.is_better(value, best_value):
            best, best_value = event, value
    return best


def _to_json(value: Any) -> float | str:
    number = float(value)  # also of a numpy or torch scalar
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
