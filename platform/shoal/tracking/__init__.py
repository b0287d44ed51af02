"""Runs and the registry: the record on storage, and MLflow as a view of it.

Importing this loads neither MLflow nor Ray nor pandas.
"""

from shoal.tracking.actor import TrackerClient, ensure_tracker, open_registry
from shoal.tracking.journal import Event, JournalSummary, RunState
from shoal.tracking.record import RunRecord, being_trained, list_runs, read_identity
from shoal.tracking.registry import RegisteredModel, Registry, ResolvedModel, parse_spec
from shoal.tracking.resizing import Resizing, Wish
from shoal.tracking.timeline import Doing, Moment, Span, Timeline, timeline_of
from shoal.tracking.tracker import Tracker, TrackerStatus

__all__ = [
    "Doing",
    "Event",
    "JournalSummary",
    "Moment",
    "RegisteredModel",
    "Registry",
    "Resizing",
    "ResolvedModel",
    "RunRecord",
    "RunState",
    "Span",
    "Timeline",
    "Tracker",
    "TrackerClient",
    "TrackerStatus",
    "Wish",
    "being_trained",
    "ensure_tracker",
    "list_runs",
    "open_registry",
    "parse_spec",
    "read_identity",
    "timeline_of",
]
