"""What a replica counted, as Ray metrics: they appear where Ray's own do, and add what those lack."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from shoal.serve.core.meter import Meter

PERIOD_S = 5.0
"""Between two exports. Adding to a Ray metric takes some 10 microseconds, too much for every request."""


async def export_metrics(meter: Meter, version: Callable[[], bytes], *, batch_size: int) -> None:
    """Hand what ``meter`` counted to Ray every `PERIOD_S`, for ever.

    ``version`` names the model that answers now, ``batch_size`` is the largest batch.
    """
    from ray.serve import metrics  # Ray's counters, with the application and the replica as tags

    answers = metrics.Counter(
        "shoal_answers_total", "Answers by status and model version.", ("status", "model")
    )
    batches = metrics.Counter("shoal_batches_total", "Batches of at most `le` requests, cumulative.", ("le",))
    batched = metrics.Counter("shoal_batched_requests_total", "Requests that ran in batches.")
    loaded = metrics.Gauge("shoal_model_loaded", "1 for the model version that answers now.", ("model",))
    exported_answers: Counter[tuple[int, bytes]] = Counter()
    exported_batches: Counter[int] = Counter()
    shown = b""
    while True:
        await asyncio.sleep(PERIOD_S)
        for (status, model), count in _grown(meter.num_answers, exported_answers).items():
            answers.inc(count, tags={"status": str(status), "model": model.decode()})
        sizes = _grown(meter.num_batches, exported_batches)
        for bound, count in cumulative(sizes, batch_size).items():
            batches.inc(count, tags={"le": bound})
        if sizes:
            batched.inc(sum(size * count for size, count in sizes.items()), tags={})
        before, shown = shown, version()
        if before not in (b"", shown):
            loaded.set(0, tags={"model": before.decode()})
        loaded.set(1, tags={"model": shown.decode()})


def cumulative(num_by_size: Mapping[int, int], largest: int) -> dict[str, int]:
    """Batches of at most 1, 2, 4, ... requests up to ``largest``, and all: what Prometheus calls ``le``.

    Bounds without a batch are left out: a counter cannot be increased by 0.
    """
    bounds = [2**power for power in range((largest - 1).bit_length() + 1)]
    counts = {
        str(bound): sum(count for size, count in num_by_size.items() if size <= bound) for bound in bounds
    }
    return {bound: count for bound, count in {**counts, "+Inf": sum(num_by_size.values())}.items() if count}


def _grown(now: Counter[Any], exported: Counter[Any]) -> Counter[Any]:
    """By how much each count has grown since the last time; ``exported`` is brought up to date."""
    grown = now - exported
    exported.update(grown)
    return grown
