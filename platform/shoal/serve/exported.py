"""What a replica counted, as Ray metrics: they appear where Ray's own do."""

from __future__ import annotations

import asyncio
from collections import Counter

from shoal.serve.core.meter import Meter

PERIOD_S = 5.0
"""Between two exports. Adding to a Ray metric takes some 10 microseconds, too much for every request."""


async def export_metrics(meter: Meter, *, period_s: float = PERIOD_S) -> None:
    """Hand what ``meter`` counted to Ray every ``period_s``, for ever."""
    from ray.util.metrics import Counter as RayCounter

    answers = RayCounter("shoal_answers_total", "Answers by HTTP status.", tag_keys=("status",))
    seconds = RayCounter("shoal_answer_seconds_total", "Time spent inside the replica on all answers.")
    exported: Counter[int] = Counter()
    exported_s = 0.0
    while True:
        await asyncio.sleep(period_s)
        for status, count in meter.num_by_status.items():
            if count > exported[status]:
                answers.inc(count - exported[status], tags={"status": str(status)})
                exported[status] = count
        if meter.seconds > exported_s:
            seconds.inc(meter.seconds - exported_s)
            exported_s = meter.seconds
