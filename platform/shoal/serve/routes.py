"""The routes of an app besides the hot one, and the page that documents them all."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from shoal.serve.core.answer import Refusal, no_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from shoal.serve.endpoint import Endpoint


OWN_PATHS = frozenset({"/predict", "/healthz", "/model", "/docs", "/openapi.json"})
"""Where every app answers; HAProxy sends the longest prefix's way, so no other app may be at one of them."""


def build_routes(endpoint: Endpoint) -> FastAPI:
    """``/predict``, ``/healthz``, ``/model``, ``/docs`` and ``/openapi.json`` for ``endpoint``."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from pydantic_core import to_json
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

    title = type(endpoint).__name__
    api = FastAPI(title=title, description=(type(endpoint).__doc__ or "").strip(), redoc_url=None)

    async def predict() -> None:
        """Ask the model about one picture, or about one sample as JSON."""
        raise NotImplementedError("the gate answers this route")  # declared here for the page alone

    async def healthz() -> Response:
        """Whether a model is loaded: 200, or 503 with the reason's code."""
        loaded = endpoint.loaded
        if loaded is None:
            raise no_model()
        return JSONResponse({"status": "ok", "model": loaded.model, "version": loaded.version})

    async def model() -> Response:
        """The model that answers now, and where it comes from."""
        # A field may be infinite, or a metric NaN, for which JSON has no word.
        content = to_json(endpoint.describe(), inf_nan_mode="strings")
        return Response(content, media_type="application/json")

    async def refuse(request: Request, error: Exception) -> Response:
        refusal = error if isinstance(error, Refusal) else _of_http_exception(error)
        answer = refusal.answer()
        headers = {name.decode(): value.decode() for name, value in answer.headers}
        return Response(answer.body, answer.status, headers, media_type="application/json")

    api.add_exception_handler(Refusal, refuse)
    api.add_exception_handler(HTTPException, refuse)
    # Named as functions in the page's "operationId"; the annotations are strings here, which FastAPI cannot
    # resolve for local types, hence response_model=None.
    api.add_api_route(
        "/predict",
        predict,
        methods=["POST"],
        responses=_PREDICT_ANSWERS,
        openapi_extra=_request_body(endpoint),
    )
    api.add_api_route("/healthz", healthz, response_model=None)
    api.add_api_route("/model", model, response_model=None)
    # Ray Serve matches each request against the routes in order: the busy one goes first.
    api.router.routes.sort(key=lambda route: getattr(route, "path", "") != "/predict")
    return api


_PREDICT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What the model says, with its name and version; also in the X-Model-Version header."
    },
    **{
        status: {"description": text}
        for status, text in {
            400: "The body is empty, broken or not what its content type says.",
            401: "An API key is needed.",
            403: "The API key is wrong.",
            408: "The body did not arrive in time.",
            413: "The body or the picture is too large.",
            415: "The content type or the kind of file is not supported.",
            422: "The JSON does not fit the model.",
            500: "The app failed on this request; the reason is in its log.",
            503: "Too many requests; try again after Retry-After.",
            504: "No answer in time.",
        }.items()
    },
}


def _request_body(endpoint: Endpoint) -> dict[str, Any]:
    """What ``POST /predict`` takes; only what the endpoint reads."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    json_body: dict[str, Any] = {"schema": {"type": "object"}}
    if endpoint.examples:
        json_body["examples"] = {name: {"value": value} for name, value in endpoint.examples.items()}
    form = {
        "schema": {
            "type": "object",
            "required": ["file"],
            "properties": {"file": {"type": "string", "format": "binary"}},
        }
    }
    content: dict[str, Any] = {}
    if endpoint.reads_json():
        content["application/json"] = json_body
    if endpoint.reads_pictures():
        content |= {"multipart/form-data": form, "image/png": binary, "image/jpeg": binary}
    return {"requestBody": {"required": True, "content": content}}


def _of_http_exception(error: Exception) -> Refusal:
    status = int(getattr(error, "status_code", 500))
    phrase = HTTPStatus(status).phrase
    allowed = (getattr(error, "headers", None) or {}).get("Allow")
    headers = ((b"allow", allowed.encode()),) if allowed else ()
    hint = f"Use {allowed}." if allowed else "The app's routes are listed at /docs."
    return Refusal(status, phrase.lower().replace(" ", "_"), f"{phrase}.", hint, headers=headers)
