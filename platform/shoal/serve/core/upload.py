"""The body of a predict request: raw picture, form with a file, or JSON."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shoal.serve.core.answer import Message, Refusal

JSON = "application/json"
PICTURES = ("image/png", "image/jpeg")
FORM = "multipart/form-data"

MAX_JSON_VALUES = 250_000
"""Values in one JSON body, those inside others and commas in texts counted: 224 x 224 x 3 pixels are 200,000. Nobody
is answered while they are parsed: 8 MiB of empty lists took 4.6 s, this many take 0.05 s (2026-11-29)."""
_FEW_BYTES = 2 * MAX_JSON_VALUES
"""A shorter body cannot hold more values: each needs a character, and another one beside it."""

_HINT = (
    "Send image/png or image/jpeg, application/json, or a form: "
    "curl -F file=@seven.png URL, or curl -H 'content-type: application/json' -d '{...}' URL."
)


def media_type(content_type: str) -> str:
    """The type without its parameters, in lower case; empty for none."""
    return content_type.partition(";")[0].strip().lower()


def parse_json(body: bytes) -> Any:
    """The JSON document in ``body``. NaN and infinity parse, so that the check of values can name them.

    Raises:
        Refusal: 400 for an empty body or bad JSON, 413 for more than `MAX_JSON_VALUES`.
    """
    from pydantic_core import from_json

    if not body:
        raise Refusal(400, "body_empty", "The request's body is empty.", _HINT)
    if len(body) > _FEW_BYTES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise Refusal(
            413,
            "too_many_values",
            f"The JSON holds more than {MAX_JSON_VALUES} values.",
            "Send fewer, or a picture as a picture.",
        )
    try:
        with _collector_paused():
            return from_json(body, cache_strings="keys")
    except ValueError:
        raise Refusal(
            400, "bad_json", "The body is not valid JSON.", "Check its quotes and brackets."
        ) from None


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: what is parsed is in use, and looking through it over and over took most of the time.

    For all threads, none of which runs while one parses.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


async def file_in_form(body: bytes, content_type: str) -> bytes:
    """The bytes of the form's part named ``file``.

    Raises:
        Refusal: 400 for a broken form or one without that file.
    """
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException
    from starlette.requests import Request

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "headers": [(b"content-type", content_type.encode("latin-1"))]}
    try:
        async with Request(scope, receive).form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            if isinstance(file, UploadFile):
                return await file.read()
    except (MultiPartException, LookupError, ValueError):  # the last of a charset that is none
        raise Refusal(400, "bad_form", "The form cannot be read.", _HINT) from None
    raise Refusal(400, "file_missing", "The form has no file in a field named 'file'.", _HINT)


def unsupported(content_type: str) -> Refusal:
    """The refusal of a content type that no app reads."""
    found = (
        f"content type {media_type(content_type)!r}" if content_type else "a request without a content type"
    )
    return Refusal(415, "content_type", f"The app does not read {found[:80]}.", _HINT)
