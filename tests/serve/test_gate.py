"""The gate, alone: sizes, deadlines, admission, versions, and that nothing inside leaks out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgi_harness import Got, ask, get, post

from shoal.serve.core.answer import Answer, Refusal
from shoal.serve.core.gate import Call, Gate, Handler, Limits
from shoal.serve.core.keys import Keys

KEY = "a-key-of-24-characters-x"


async def echo(call: Call) -> Answer:
    return Answer(call.body, version=b"digits@7")


async def _rest(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"rest"})


def gate(handler: Handler = echo, *, keys: Keys | None = None, **limits: Any) -> Gate:
    return Gate(
        _rest,
        hot={("POST", "/predict"): handler},
        limits=Limits(**limits),
        version=lambda: b"digits@8",
        keys=keys,
    )


def test_answer_names_the_version_that_gave_it() -> None:
    got = post(gate(), b"hello", None)
    assert (got.status, got.body, got.headers["x-model-version"]) == (200, b"hello", "digits@7")
    assert get(gate(), "/elsewhere").headers["x-model-version"] == "digits@8"


def test_refusal_is_json_with_the_version() -> None:
    async def refuse(call: Call) -> Answer:
        raise Refusal(422, "no", "No.", "Try yes.")

    got = post(gate(refuse), b"", None)
    assert got.status == 422
    assert got.json == {"error": {"code": "no", "message": "No.", "hint": "Try yes."}}
    assert got.headers["x-model-version"] == "digits@8"
    assert got.headers["content-type"] == "application/json"


def test_a_bug_inside_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(call: Call) -> Answer:
        raise RuntimeError("secret /path")

    got = post(gate(fail), b"", None)
    assert (got.status, got.code) == (500, "internal_error")
    assert b"secret" not in got.body
    assert b"Traceback" not in got.body
    assert "secret /path" in caplog.text


@pytest.mark.parametrize("headers", [{}, {"content-length": "3"}, {"content-length": "nonsense"}])
def test_counted_body_beyond_the_limit_is_refused(headers: dict[str, str]) -> None:
    got = post(gate(max_body_bytes=10), [b"x" * 4] * 3, None, headers=headers)
    assert (got.status, got.code) == (413, "body_too_large")


def test_body_at_the_limit_passes() -> None:
    assert post(gate(max_body_bytes=12), [b"x" * 4] * 3, None).body == b"x" * 12


def test_declared_length_beyond_the_limit_is_refused_unread() -> None:
    got = post(gate(max_body_bytes=10), b"", None, headers={"content-length": "11"}, stall=True)
    assert (got.status, got.code) == (413, "body_too_large")


def test_endless_body_is_cut_at_the_limit() -> None:
    got = post(gate(max_body_bytes=10), [b"x" * 6, b"x" * 6], None, stall=True)
    assert got.status == 413


def test_slow_body_and_slow_answer_are_told_apart() -> None:
    async def never(call: Call) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    slow_body = post(gate(deadline_s=0.02), b"x", None, stall=True)
    assert (slow_body.status, slow_body.code) == (408, "body_too_slow")
    slow_answer = post(gate(never, deadline_s=0.02), b"x", None)
    assert (slow_answer.status, slow_answer.code) == (504, "deadline_exceeded")


def test_more_than_the_queue_gets_503_and_the_rest_an_answer() -> None:
    async def main() -> tuple[Gate, list[Got], Got]:
        let_go = asyncio.Event()

        async def wait(call: Call) -> Answer:
            await let_go.wait()
            return Answer(b"")

        app = gate(wait, max_queue=2)
        inside = [asyncio.create_task(ask(app)) for _ in range(2)]
        while app.num_inside < 2:
            await asyncio.sleep(0)
        refused = await ask(app)
        healthy = await ask(app, "GET", "/healthz")
        assert healthy.status == 200, "a health check must not be refused when busy"
        let_go.set()
        return app, list(await asyncio.gather(*inside)), refused

    app, answered, refused = asyncio.run(main())
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "too_many_requests", "1")
    assert [got.status for got in answered] == [200, 200]
    assert app.num_inside == 0
    assert app.meter.num_answers == {(200, b"digits@8"): 3, (503, b"digits@8"): 1}


def test_places_are_given_back_after_errors_and_cancellation() -> None:
    async def main() -> Gate:
        async def wait(call: Call) -> Answer:
            if call.body == b"fail":
                raise RuntimeError
            await asyncio.Event().wait()
            raise AssertionError

        app = gate(wait, max_queue=1)
        assert (await ask(app, body=b"fail")).status == 500
        task = asyncio.create_task(ask(app))
        while not app.num_inside:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return app

    assert asyncio.run(main()).num_inside == 0


def test_caller_that_leaves_gets_no_answer_and_holds_no_place() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    app = gate()
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    asyncio.run(app(scope, receive, send))
    assert not sent
    assert app.num_inside == 0
    assert app.meter.num_answers == {(0, b""): 1}


@pytest.mark.parametrize("declared", [{"content-length": "9"}, {"transfer-encoding": "chunked"}])
def test_who_is_refused_before_the_body_came_cannot_go_on_sending(
    declared: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.serve.core.gate._HEAR_OUT_S", 0.01)
    key = {"x-api-key": KEY}
    for got in (
        post(gate(keys=Keys([KEY])), b"", None, headers=declared, stall=True),
        post(gate(deadline_s=0.01), b"", None, headers=declared, stall=True),
        post(gate(max_body_bytes=3), b"xxxx", None, headers=declared, stall=True),
        asyncio.run(ask(gate(keys=Keys([KEY])), path="/healthz", headers=declared, stall=True)),
    ):
        assert got.headers.get("connection") == "close", got.status
    for kept in (
        post(gate(max_queue=0), b"x" * 9, None, headers=declared),
        post(gate(keys=Keys([KEY])), b"x" * 9, None, headers=declared | key),
        asyncio.run(ask(gate(keys=Keys([KEY])), path="/model", body=b"x" * 9, headers=declared | key)),
        get(gate(keys=Keys([KEY])), "/model"),
        get(gate(keys=Keys([KEY])), "/model", headers={"content-length": "0"}),
    ):
        assert "connection" not in kept.headers


def test_who_is_refused_may_finish_sending_within_bounds_and_reads_the_answer() -> None:
    """What comes after the end resets the connection, and the answer is lost."""
    events: list[str] = []
    sizes = [4, 4, 4, 4]

    async def receive() -> dict[str, Any]:
        events.append("took")
        return {"type": "http.request", "body": bytes(sizes.pop()), "more_body": bool(sizes)}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            events.append("answer" if message["more_body"] else "end")

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"content-length", b"16")]}
    app = gate(keys=Keys([KEY]), max_body_bytes=100)
    asyncio.run(app(dict(scope), receive, send))
    assert events == ["answer", "took", "took", "took", "took", "end"]
    events.clear()
    sizes.extend([100] * 99)
    asyncio.run(app(dict(scope), receive, send))
    assert events == ["answer", *["took"] * 16, "end"], "no more than 16 times the limit"


def test_not_many_who_are_refused_are_heard_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    timeout = asyncio.timeout

    def noted(seconds: float) -> asyncio.Timeout:
        heard.append(seconds)
        return timeout(0.02)

    monkeypatch.setattr(asyncio, "timeout", noted)

    async def main() -> list[Got]:
        app = gate(keys=Keys([KEY]))
        return await asyncio.gather(
            *(ask(app, headers={"content-length": "9"}, stall=True) for _ in range(100))
        )

    assert {got.status for got in asyncio.run(main())} == {401}
    assert len(heard) == 8


def test_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate()({"type": "websocket", "path": "/predict", "headers": []}, send, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic abc"}])
def test_no_key(headers: dict[str, str]) -> None:
    got = post(gate(keys=Keys([KEY])), b"x", None, headers=headers)
    assert (got.status, got.code, got.headers["www-authenticate"]) == (401, "key_missing", "Bearer")


@pytest.mark.parametrize("key", ["not-the-key", KEY[:-1], KEY + "x", "", KEY.upper()])
def test_wrong_key(key: str) -> None:
    got = post(gate(keys=Keys([KEY])), b"x", None, headers={"x-api-key": key})
    assert (got.status, got.code) == (403, "key_wrong")
    assert not key or key not in got.body.decode()


@pytest.mark.parametrize("headers", [{"x-api-key": KEY}, {"authorization": f"bearer {KEY}"}])
def test_right_key_opens_everything_and_health_needs_none(headers: dict[str, str]) -> None:
    app = gate(keys=Keys(["another-key-of-24-charact", KEY]))
    assert post(app, b"x", None, headers=headers).status == 200
    assert get(app, "/model").status == 401
    assert get(app, "/model", headers=headers).status == 200
    assert get(app, "/healthz").status == 200


def test_a_key_is_asked_for_before_the_body_is_read() -> None:
    got = post(gate(keys=Keys([KEY]), max_body_bytes=1), b"xx", None, stall=True)
    assert got.status == 401
