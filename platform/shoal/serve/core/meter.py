"""Counts of what a replica answered; cheap to add to, read by whoever exports them."""

from __future__ import annotations

from collections import Counter


class Meter:
    """Answers by status, and the time they took, since the process began. For one event loop."""

    def __init__(self) -> None:
        self.num_by_status: Counter[int] = Counter()
        self.seconds = 0.0

    def observe(self, status: int, seconds: float) -> None:
        """Count one answer; status 0 is a caller who left before there was one."""
        self.num_by_status[status] += 1
        self.seconds += seconds
