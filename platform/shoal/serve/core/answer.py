"""What goes back to a caller: an answer, or a refusal that says what to do next."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import RequestError

# The ASGI callables (https://asgi.readthedocs.io/en/latest/specs/main.html), without importing a framework.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer."""

    body: bytes
    status: int = 200
    content_type: bytes = b"application/json"
    headers: tuple[Header, ...] = ()
    version: bytes | None = None
    """The model version that gave this answer; None for the one that answers now."""


class Refusal(RequestError):
    """A request that gets an error answer. ``code`` is stable for programs, ``hint`` says what to do next.

    Everything in it is shown to the caller: never put a path, a key or an exception's text there.
    """

    def __init__(
        self, status: int, code: str, message: str, hint: str, *, headers: tuple[Header, ...] = ()
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint
        self.headers = headers
        super().__init__(f"{message} {hint}")

    def __reduce__(self) -> Any:
        return _rebuild_refusal, (self.status, self.code, self.message, self.hint, self.headers)

    def answer(self) -> Answer:
        """The refusal as JSON: ``{"error": {"code", "message", "hint"}}``."""
        error = {"code": self.code, "message": self.message, "hint": self.hint}
        return Answer(json.dumps({"error": error}).encode(), status=self.status, headers=self.headers)


def no_model() -> Refusal:
    """The refusal before the first model is loaded."""
    return Refusal(503, "no_model", "No model is loaded yet.", "Try again in a few seconds.")


def _rebuild_refusal(status: int, code: str, message: str, hint: str, headers: tuple[Header, ...]) -> Refusal:
    return Refusal(status, code, message, hint, headers=headers)
