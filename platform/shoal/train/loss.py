"""Workers that were lost, as it is told to the run's record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from shoal.tracking import RunRecord


@dataclass(frozen=True)
class LossReport:
    """Who was lost."""

    ranks: list[int]
    """Empty where the whole group is gone with its controller."""
    step: int
    """Steps done by then, as far as the workers had said; 0 where that is not known."""
    why: str


OnLoss = Callable[[LossReport], None]


def record_loss(record: RunRecord, report: LossReport) -> None:
    """Write it to the run's record, as of now; where that cannot be written, the run goes on without the line."""
    record.note("lost", **asdict(report))
