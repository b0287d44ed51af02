"""What a caller is told of an answer that is no app's, without an app."""

from __future__ import annotations

import io
import json
import urllib.error
from email.message import Message

import pytest

from shoal.errors import AccessError, ClusterError, RequestError, ShoalError
from shoal.serve.handle import _as_error

TOLD = json.dumps({"error": {"message": "too large.", "hint": "send less"}})


@pytest.mark.parametrize(
    ("code", "body", "kind", "text"),
    [
        (413, TOLD, RequestError, "too large. send less"),
        (401, TOLD, AccessError, "too large. send less"),
        (503, "<html>no server</html>", ClusterError, "<html>no server</html>"),
        (500, '{"error": "text"}', ClusterError, '{"error": "text"}'),
        (500, "[]", ClusterError, "[]"),
        (500, "[" * 4000, ClusterError, "[["),
    ],
)
def test_an_answer_that_is_not_of_an_app_is_shown_as_it_came(
    code: int, body: str, kind: type[ShoalError], text: str
) -> None:
    answer = urllib.error.HTTPError("http://x", code, "", Message(), io.BytesIO(body.encode()))
    error = _as_error("digits", answer)
    assert type(error) is kind
    assert str(error).startswith(f"app 'digits' answered {code}: {text}")
