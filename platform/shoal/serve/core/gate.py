"""The gate that every request to an app passes: keys, admission, body size, deadline, version, counting.

Written as one raw ASGI callable: a framework's middleware stack costs more than the model does (a request to
the digits app takes about 0.2 ms in all). The hot routes are called from here; all others go to a framework.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.serve.core.answer import Answer, ASGIApp, Header, Message, Receive, Refusal, Scope, Send
from shoal.serve.core.keys import Keys
from shoal.serve.core.meter import Meter

logger = logging.getLogger(__name__)

_RETRY_AFTER: tuple[Header, ...] = ((b"retry-after", b"1"),)
_HEAR_OUT_S = 2.0
_MAX_HEARD_OUT = 8
"""Callers at once who may finish sending what is not read. Ray counts them among its requests, see `builder`."""
_HEALTH = "/healthz"
"""Open to everybody, without a key or a place in the queue."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one replica takes on at most."""

    max_body_bytes: int = 8 * 2**20
    deadline_s: float = 30.0
    """From the request's first byte to its answer, a slow upload included."""
    max_queue: int = 200
    """Requests inside this replica at once, those in the running batch included; the next one gets 503."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request to a hot route, its body already read and within bounds."""

    body: bytes
    content_type: str
    """The header as sent; empty where there is none."""


Handler = Callable[[Call], Awaitable[Answer]]


class Gate:
    """An ASGI app that lets requests through to ``hot`` handlers or to ``app``, within ``limits``.

    Every answer carries ``X-Model-Version``. One that comes before the whole body did closes the connection, but for
    a full queue: the caller could hold it for as long as he goes on sending, since nobody counts what comes then.
    Errors are JSON, never a traceback: what went wrong inside is logged here and the caller reads "internal error".
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hot: Mapping[tuple[str, str], Handler],
        limits: Limits,
        version: Callable[[], bytes],
        keys: Keys | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._app = app
        self._hot = dict(hot)
        self._limits = limits
        self._version = version
        self._keys = keys
        self.meter = meter or Meter()
        self.num_inside = 0
        self._num_heard_out = 0
        # Ray Serve reads these two off an ASGI app to name the route in its own metrics.
        self.routes = getattr(app, "routes", [])
        self.router = getattr(app, "router", None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._refuse_protocol(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        reply = _Reply(send, self._version, scope)
        try:
            await self._pass(path, scope, receive, reply)
        except Refusal as refusal:
            await reply.send_answer(refusal.answer())
        except _CallerLeft:
            logger.debug("%s %s: the caller left", scope["method"], path)  # counted below, as status 0
        except Exception:
            logger.exception("%s %s failed", scope["method"], path)
            await reply.send_answer(_internal().answer())
        self.meter.num_answers[reply.status, reply.version] += 1
        if reply.status and reply.is_early:
            await self._hear_out(receive)
            await reply.end()

    async def _pass(self, path: str, scope: Scope, receive: Receive, reply: _Reply) -> None:
        if path == _HEALTH:  # a health check must not queue behind what it checks
            await self._app(scope, receive, reply)
            return
        if self._keys is not None:
            self._keys.check(scope["headers"])
        if self.num_inside >= self._limits.max_queue:
            reply.may_stay = True  # to connect again would cost more than the answer
            raise Refusal(
                503,
                "too_many_requests",
                "The app is busy: its queue is full.",
                "Try again after the time in Retry-After.",
                headers=_RETRY_AFTER,
            )
        self.num_inside += 1
        try:
            await self._run_with_deadline(path, scope, receive, reply)
        finally:
            self.num_inside -= 1

    async def _run_with_deadline(self, path: str, scope: Scope, receive: Receive, reply: _Reply) -> None:
        handler = self._hot.get((scope["method"], path))
        body: bytes | None = None
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                body = await self._read_body(scope, receive)
                reply.has_read = True
                if handler is None:
                    await self._app(scope, _replay(body, receive), reply)
                else:
                    await reply.send_answer(await handler(Call(body, _content_type(scope["headers"]))))
        except TimeoutError:
            raise (_slow_body() if body is None else _slow_answer()) from None

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body; a declared length is believed only where it refuses, what arrives is counted."""
        limit = self._limits.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > limit:
                raise _too_large(limit)
        chunks: list[bytes] = []
        size_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _CallerLeft
            chunk = message.get("body", b"")
            size_bytes += len(chunk)
            if size_bytes > limit:
                raise _too_large(limit)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _hear_out(self, receive: Receive) -> None:
        """Take in, for a while, what a refused caller still sends.

        Closed at once, his next bytes reset the connection, and most clients then report that instead of the answer.
        """
        if self._num_heard_out >= _MAX_HEARD_OUT:
            return
        self._num_heard_out += 1
        try:
            async with asyncio.timeout(_HEAR_OUT_S):
                left_bytes = 16 * self._limits.max_body_bytes
                while left_bytes > 0:
                    message = await receive()
                    if not message.get("more_body", False):  # the end, or the caller left
                        return
                    left_bytes -= len(message.get("body", b""))
        except TimeoutError:
            return
        finally:
            self._num_heard_out -= 1

    async def _refuse_protocol(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:  # a websocket would bypass every check above
            await send({"type": "websocket.close", "code": 1003})


class _Reply:
    """The caller's ``send``, which adds to every answer what all have, and notes its status and model version."""

    __slots__ = ("_scope", "_send", "_version_now", "has_read", "may_stay", "status", "version")

    def __init__(self, send: Send, version: Callable[[], bytes], scope: Scope) -> None:
        self._send = send
        self._version_now = version
        self._scope = scope
        self.has_read = False
        """Whether the whole body has come."""
        self.may_stay = False
        """Whether the connection may outlive an answer that is early."""
        self.status = 0
        self.version = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.version = self._version_now()
            headers = [*message.get("headers", ()), *self._headers()]
            message = {**message, "headers": headers}
        elif self.is_early:
            message = {**message, "more_body": True}
        await self._send(message)

    async def send_answer(self, answer: Answer) -> None:
        if self.status:  # the answer had begun: it cannot be taken back, so the connection is cut
            raise ConnectionAbortedError("the answer failed half way")
        self.status = answer.status
        self.version = answer.version or self._version_now()
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", b"%d" % len(answer.body)),
            *self._headers(),
            *answer.headers,
        ]
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": answer.body, "more_body": self.is_early})

    @property
    def is_early(self) -> bool:
        """Whether the caller may still be sending; the answer stays open till `end`."""
        return not self.has_read and _announces_body(self._scope["headers"])

    async def end(self) -> None:
        """End an answer that is early."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _headers(self) -> tuple[Header, ...]:
        version = (b"x-model-version", self.version)
        return (version, (b"connection", b"close")) if self.is_early and not self.may_stay else (version,)


def _announces_body(headers: Any) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in headers
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replayed() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _content_type(headers: Any) -> str:
    for name, value in headers:
        if name == b"content-type":
            return str(value.decode("latin-1"))
    return ""


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        "body_too_large",
        f"The request's body is larger than {limit} bytes.",
        "Send a smaller picture; the bound is serve.max_body in cluster.yaml.",
    )


def _slow_body() -> Refusal:
    return Refusal(408, "body_too_slow", "The request's body did not arrive in time.", "Send it faster.")


def _slow_answer() -> Refusal:
    return Refusal(
        504,
        "deadline_exceeded",
        "The app did not answer in time.",
        "Try again; the bound is serve.request_timeout in cluster.yaml.",
        headers=_RETRY_AFTER,
    )


def _internal() -> Refusal:
    return Refusal(
        500, "internal_error", "The app failed on this request.", "The reason is in its log: shoal logs NAME."
    )


class _CallerLeft(Exception):
    """The connection closed before the body was whole; there is nobody to answer."""
