"""Counts of what a replica did; cheap to add to, read by whoever exports them."""

from __future__ import annotations

from collections import Counter


class Meter:
    """Answers and batches since the process began. For one event loop."""

    def __init__(self) -> None:
        self.num_answers: Counter[tuple[int, bytes]] = Counter()
        """By status and the model version that the caller read; status 0 is a caller who left before."""
        self.num_batches: Counter[int] = Counter()
        """By size: the requests in one forward."""
