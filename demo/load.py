"""Ask an app many times at once, and say how fast it answered. Talks to one URL and stops by itself."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np


@dataclass(frozen=True)
class LoadResult:
    """What a few seconds of load gave."""

    num_answers: int
    num_errors: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float


def ask_under_load(url: str, document: Any, *, connections: int, seconds: float) -> LoadResult:
    """Keep ``connections`` requests in flight for ``seconds``. Blocks."""
    return asyncio.run(_ask(url, document, connections, seconds))


async def _ask(url: str, document: Any, connections: int, seconds: float) -> LoadResult:
    latencies: list[float] = []
    errors = 0
    started = time.perf_counter()
    deadline = started + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal errors
        while (begun := time.perf_counter()) < deadline:
            try:
                async with session.post(url, json=document) as response:
                    await response.read()
                    ok = response.status == 200
            except aiohttp.ClientError:
                ok = False
            if ok:
                latencies.append(time.perf_counter() - begun)
            else:
                errors += 1

    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections), timeout=timeout
    ) as session:
        await asyncio.gather(*(client(session) for _ in range(connections)))
    elapsed_s = time.perf_counter() - started
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000 if latencies else (float("nan"), float("nan"))
    return LoadResult(len(latencies), errors, len(latencies) / elapsed_s, float(p50), float(p99))
