"""A worker that hung, as it is told: to the run's record, and from there to a person."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from shoal.tracking import Event, RunRecord


@dataclass(frozen=True)
class StallReport:
    """What was found of a worker that hung. Of workers that waited for each other it names each."""

    ranks: list[int]
    pids: list[int]
    step: int
    """Steps done; it hung in the next."""
    phase: str
    seconds: float
    why: str
    places: list[str]
    """Where each of them stood; empty where it could not be asked."""
    stack: str
    """Of their training threads, innermost call first; the ranks' logs have those of all threads."""
    replaced: bool
    """False: no restart was left, so nothing would be gained by ending the run."""


OnStall = Callable[[StallReport], None]


def record_stall(record: RunRecord, report: StallReport) -> None:
    """Write it to the run's record.

    Raises:
        StorageError: it cannot be written.
    """
    record.append("stall", **asdict(report))


def stall_text(event: Event) -> str:
    """One line on a ``stall`` of the record."""
    who = [
        f"rank {rank} (pid {pid}{f', at {place}' if place else ''})"
        for rank, pid, place in zip(event["ranks"], event["pids"], event["places"], strict=True)
    ]
    where = f"step {event['step']:,}" + ("" if event["phase"] == "step" else f" ({event['phase']})")
    then = "replaced" if event["replaced"] else "left alone, as no restart is left"
    return f"{' and '.join(who)} {event['why']} for {event['seconds']:.0f} s after {where}: {then}"
