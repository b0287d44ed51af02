"""What a caller is told of an answer that is no app's, without an app."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import urllib.error
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.cluster import dashboard
from shoal.errors import AccessError, ClusterError, RequestError, ShoalError
from shoal.serve.handle import App, _as_error, answering_model
from shoal.serve.rest import read_serve

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


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n{}",
    ],
)
def test_an_answer_that_breaks_off_is_said_to_be_none(answer: bytes, tmp_path: Path) -> None:
    """A replica or a dashboard that dies while it answers, or another program at its port."""
    (tmp_path / "token").write_text("t")
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def serve() -> None:
            while not asked or asked[-1]:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    asked.append(connection.recv(65536))
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(5)
                    while connection.recv(65536):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        config = {"version": 1, "name": "x"}
        info: Any = SimpleNamespace(
            name="x",
            dashboard_url=url,
            token_path=tmp_path / "token",
            is_foreign=False,
            config=config,
            project=tmp_path,
        )
        app = App(name="digits", url=url, model="digits@1", info=info)
        for call in (
            lambda: app.predict({}),
            app.curl,
            lambda: read_serve(info),
            lambda: dashboard.get(url, "/", info.token_path),
        ):
            with pytest.raises(ClusterError, match="does not answer"):
                call()
        assert answering_model(url)
        socket.create_connection(listener.getsockname()).close()
        thread.join(10)
        assert not thread.is_alive()
