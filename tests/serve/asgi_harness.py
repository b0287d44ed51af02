"""Drives an ASGI app directly: no server, no sockets, no HTTP library."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.serve.core.answer import ASGIApp


@dataclass
class Got:
    """What the app answered."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code."""
        error = self.json["error"]
        assert error.keys() == {"code", "message", "hint"}
        assert error["message"]
        assert error["hint"]
        return error["code"]


async def ask(
    app: ASGIApp,
    method: str = "POST",
    path: str = "/predict",
    *,
    body: bytes | Sequence[bytes] = b"",
    headers: dict[str, str] | None = None,
    stall: bool = False,
) -> Got:
    """Send one request; ``stall`` never sends the body's end."""
    chunks = [body] if isinstance(body, bytes) else list(body)
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": chunk, "more_body": stall or number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()  # the connection stays open
        raise AssertionError

    got = Got()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not got.status, "two answers to one request"
            got.status = message["status"]
            got.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            got.body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    await app(scope, receive, send)
    return got


def get(app: ASGIApp, path: str, **more: Any) -> Got:
    return asyncio.run(ask(app, "GET", path, **more))


def post(app: ASGIApp, body: bytes | Sequence[bytes], content_type: str | None, **more: Any) -> Got:
    headers = {
        **({"content-type": content_type} if content_type is not None else {}),
        **more.pop("headers", {}),
    }
    return asyncio.run(ask(app, body=body, headers=headers, **more))
