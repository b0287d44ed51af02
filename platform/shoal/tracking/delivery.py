"""Deciding what MLflow is told about a run: from journal lines to batches it accepts. No MLflow here.

Delivering the same lines again changes nothing: an MLflow metric is keyed by (run, key, step, timestamp,
value), and all five come from the journal.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from shoal.tracking.journal import Event, metric_columns
from shoal.tracking.timeline import Timeline

# MLflow's own limits (mlflow/utils/validation.py of 3.17); a batch above them is refused whole.
MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_TAGS = 100
MAX_KEY_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000

T = TypeVar("T")

_NOT_IN_KEYS = re.compile(r"[^/\w.\- :]")


class Point(NamedTuple):
    """One value of one metric, as MLflow keeps it."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one ``log_batch`` call carries: entries of one sort, and not above MLflow's limits."""

    metrics: tuple[Point, ...] = ()
    params: tuple[tuple[str, str], ...] = ()
    tags: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.metrics) + len(self.params) + len(self.tags)

    def halves(self) -> tuple[Batch, Batch]:
        """Two batches that together say the same; for finding the one entry that a server refuses."""
        m, p, t = len(self.metrics) // 2, len(self.params) // 2, len(self.tags) // 2
        return (
            Batch(metrics=self.metrics[:m], params=self.params[:p], tags=self.tags[:t]),
            Batch(metrics=self.metrics[m:], params=self.params[p:], tags=self.tags[t:]),
        )


def plan_metrics(events: Iterable[Event]) -> list[Batch]:
    """The batches with every metric in ``events``, in their order."""
    points = [
        Point(key=clean_key(name), value=value, timestamp_ms=int(event["t"] * 1000), step=event["step"])
        for event in events
        for name, value in metric_columns(event).items()
    ]
    return [Batch(metrics=chunk) for chunk in _chunks(points, MAX_METRICS)]


def plan_timeline(timeline: Timeline, *, step: int, t: float) -> list[Batch]:
    """The batches with goodput and counts of a run's timeline: metrics ``timeline/...`` of that step and moment."""
    counts = timeline.counts
    values = {
        "wall_s": timeline.wall_s,
        "steps_lost": float(timeline.steps_lost),
        "recoveries": float(len(timeline.recoveries_s)),
        **{f"{kind}s": float(counts.get(kind, 0)) for kind in ("start", "stall", "resize", "checkpoint")},
    }
    if timeline.goodput is not None:
        values["goodput"] = timeline.goodput
    if timeline.recoveries_s:
        values["recovery_s_max"] = max(timeline.recoveries_s)
    points = [
        Point(key=f"timeline/{name}", value=value, timestamp_ms=int(t * 1000), step=step)
        for name, value in values.items()
    ]
    return [Batch(metrics=tuple(points))]


def plan_params(identity: Mapping[str, Any]) -> list[Batch]:
    """The batches with a run's parameters: its recipe's fields by name, the rest as ``identity.*``."""
    fields = identity.get("fields", {})
    rest = {f"identity.{key}": value for key, value in identity.items() if key != "fields"}
    params = [
        (clean_key(key), clean_text(value)[:MAX_PARAM_LENGTH])
        for key, value in [*_leaves(fields), *_leaves(rest)]
    ]
    return [Batch(params=chunk) for chunk in _chunks(params, MAX_PARAMS)]


def plan_tags(tags: Mapping[str, str]) -> list[Batch]:
    """The batches with ``tags``."""
    entries = [(clean_key(key), clean_text(value)[:MAX_TAG_LENGTH]) for key, value in tags.items()]
    return [Batch(tags=chunk) for chunk in _chunks(entries, MAX_TAGS)]


def start_tags(event: Event) -> dict[str, str]:
    """What a ``start`` line says about where and from what the run was started."""
    names = ("attempt", "workers", "host", "source", "revision")
    return {f"shoal.{name}": clean_text(event[name]) for name in names if event.get(name) not in (None, "")}


def experiment_name(identity: Mapping[str, Any], *, sweep: str | None = None) -> str:
    """The MLflow experiment a run belongs to: its sweep, else its recipe's name, else ``shoal``."""
    return clean_text(sweep or str(identity.get("recipe") or "shoal").rpartition(":")[2])[:MAX_KEY_LENGTH]


def clean_key(name: str) -> str:
    """``name`` with what MLflow refuses in a metric's or parameter's name replaced by ``_``."""
    key = _NOT_IN_KEYS.sub("_", name)[:MAX_KEY_LENGTH].rstrip() or "_"
    normal = posixpath.normpath(key)
    if normal != key or normal.startswith(("/", "..")) or normal == ".":
        key = key.replace("/", "_").replace(".", "_")
    return key


def clean_text(value: Any) -> str:
    """``value`` as text that every store can encode; what is not text becomes JSON."""
    # Bytes of a command line that are not UTF-8 are lone surrogates in Python, which UTF-8 cannot hold.
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, value


def _chunks(entries: list[T], size: int) -> Iterator[tuple[T, ...]]:
    for start in range(0, len(entries), size):
        yield tuple(entries[start : start + size])
