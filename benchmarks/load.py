"""A small HTTP load generator: connections on loopback, each with one request in flight, for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What a burst of requests measured."""

    requests_per_s: float
    """Of answers with status 200."""
    p50_ms: float
    p99_ms: float
    num_errors: int
    """Answers with a status other than 200, and connections that broke."""


class _Caller(asyncio.Protocol):
    """One connection: sends, waits for the whole answer (of known length or chunked), sends again."""

    def __init__(
        self, request: bytes, until: float, latencies_s: list[float], done: asyncio.Future[None]
    ) -> None:
        self._request = request
        self._until = until
        self._latencies_s = latencies_s
        self._done = done
        self._buffer = b""
        self.num_errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator or not _is_whole(head.lower(), body):
            return
        self._buffer = b""
        now = time.perf_counter()
        if head.startswith(b"HTTP/1.1 200"):
            self._latencies_s.append(now - self._sent)
        else:
            self.num_errors += 1
        if now < self._until:
            self._send()
        else:
            self._transport.close()
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self.num_errors += not self._done.done()
        self._finish()

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


def _is_whole(head: bytes, body: bytes) -> bool:
    _, found, length = head.partition(b"content-length: ")
    if found:
        return len(body) >= int(length.split(b"\r\n", 1)[0])
    return body.endswith(b"0\r\n\r\n")


def run_load(
    port: int,
    path: str,
    body: bytes,
    content_type: str,
    *,
    seconds: float,
    connections: int = 32,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """Send ``body`` again and again for ``seconds``. Blocks that long; 30 s longer if answers do not come."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {content_type}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def main() -> Load:
        loop = asyncio.get_running_loop()
        latencies_s: list[float] = []
        started = time.perf_counter()
        callers, waits = [], []
        for _ in range(connections):
            done = loop.create_future()
            caller = _Caller(request, started + seconds, latencies_s, done)
            await loop.create_connection(lambda caller=caller: caller, "127.0.0.1", port)
            callers.append(caller)
            waits.append(done)
        _, late = await asyncio.wait(waits, timeout=seconds + 30)
        elapsed_s = time.perf_counter() - started
        ordered = sorted(latencies_s) or [float("nan")]
        return Load(
            requests_per_s=len(latencies_s) / elapsed_s,
            p50_ms=1000 * ordered[len(ordered) // 2],
            p99_ms=1000 * ordered[int(len(ordered) * 0.99)],
            num_errors=sum(caller.num_errors for caller in callers) + len(late),
        )

    return asyncio.run(main())
