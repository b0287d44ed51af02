"""A running app, as a client sees it: ask it, look at it, delete it."""

from __future__ import annotations

import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import AccessError, ClusterError, RequestError
from shoal.serve.rest import BROKEN, MAX_ANSWER_BYTES, OPENER, read_serve

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

_PNG = b"\x89PNG"


@dataclass(frozen=True, kw_only=True)
class AppStatus:
    """An app at one moment."""

    name: str
    state: str
    """Ray's word: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, DELETING or NOT_STARTED."""
    message: str
    """Why it is not RUNNING; empty when it is."""
    replicas: int
    """Replicas that answer."""
    url: str


@dataclass(frozen=True, kw_only=True)
class App:
    """A deployed app."""

    name: str
    url: str
    """Where it answers, without a slash at the end."""
    model: str
    """The version it was deployed with, ``digits@3``; an alias if ``serve deploy`` resolved it."""
    info: ClusterInfo = field(repr=False, compare=False)

    def predict(
        self, sample: Path | bytes | Mapping[str, Any] | Any, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """The app's answer to a picture (a path or bytes), a JSON document (a mapping) or an array of pixels.

        Blocks. Sends the first key of ``serve.keys_file`` if the cluster has one.

        Raises:
            RequestError: the app cannot read the sample; says why.
            AccessError: the key is missing or wrong.
            ClusterError: the app does not answer, is busy or failed.
        """
        body, content_type = _encode(sample)
        headers = {"Content-Type": content_type, **_key_header(self.info)}
        request = urllib.request.Request(f"{self.url}/predict", data=body, headers=headers)
        try:
            with OPENER.open(request, timeout=timeout_s) as response:
                answer: dict[str, Any] = json.loads(response.read(MAX_ANSWER_BYTES))
                return answer
        except urllib.error.HTTPError as error:
            raise _as_error(self.name, error) from None
        except BROKEN as error:
            raise ClusterError(
                f"app {self.name!r} at {self.url} does not answer ({error}). See: shoal status"
            ) from None

    def curl(self) -> str:
        """A command for a shell that asks the app, as its API's page describes it; names no key.

        Raises:
            ClusterError: the app does not answer.
        """
        request = urllib.request.Request(f"{self.url}/openapi.json", headers=_key_header(self.info))
        try:
            with OPENER.open(request, timeout=10.0) as response:
                page = json.loads(response.read(MAX_ANSWER_BYTES))
        except BROKEN as error:
            raise ClusterError(
                f"app {self.name!r} at {self.url} does not answer ({error}). See: shoal status"
            ) from None
        content = page["paths"]["/predict"]["post"]["requestBody"]["content"]
        has_keys = bool(_key_header(self.info))
        return curl_command(f"{self.url}/predict", content, has_keys=has_keys)

    def status(self) -> AppStatus:
        """How the app is now.

        Raises:
            ClusterError: the cluster does not answer.
        """
        from shoal.serve.deploying import reason_of

        details = read_serve(self.info)["applications"].get(self.name) or {"status": "NOT_STARTED"}
        replicas = [
            replica
            for deployment in (details.get("deployments") or {}).values()
            for replica in deployment.get("replicas") or ()
        ]
        return AppStatus(
            name=self.name,
            state=details["status"],
            message="" if details["status"] == "RUNNING" else reason_of(details),
            replicas=sum(replica["state"] == "RUNNING" for replica in replicas),
            url=self.url,
        )

    def delete(self) -> None:
        """Take the app off the cluster; see `shoal.serve.delete`."""
        from shoal.serve.deploying import delete

        delete(self.info, self.name)


def curl_command(url: str, content: Mapping[str, Any], *, has_keys: bool) -> str:
    """A ``curl`` that sends what ``content`` (OpenAPI's, by media type) says that ``url`` takes. Pure."""
    key = ["-H", "X-API-Key: KEY"] if has_keys else []
    if "multipart/form-data" in content:
        sent = ["-F", "file=@picture.png"]
    else:
        examples = content.get("application/json", {}).get("examples") or {"": {"value": {}}}
        document = json.dumps(next(iter(examples.values()))["value"])
        sent = ["-H", "Content-Type: application/json", "-d", document]
    return shlex.join(["curl", *key, *sent, url])


def answering_model(url: str, *, timeout_s: float = 5.0) -> str:
    """The version that answers at ``url`` now, ``digits@3``; says what went wrong where none does."""
    try:
        with OPENER.open(f"{url}/healthz", timeout=timeout_s) as response:
            return str(response.headers.get("X-Model-Version", "an app without X-Model-Version"))
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except BROKEN as error:
        return f"nothing ({error})"


def _encode(sample: Any) -> tuple[bytes, str]:
    if isinstance(sample, Path):
        try:
            sample = sample.read_bytes()
        except OSError as error:
            raise RequestError(f"cannot read {sample}: {error.strerror}") from None
    if isinstance(sample, bytes):
        return sample, "image/png" if sample.startswith(_PNG) else "image/jpeg"
    document = (
        sample if isinstance(sample, Mapping) else {"pixels": getattr(sample, "tolist", lambda: sample)()}
    )
    try:
        return json.dumps(document, allow_nan=False).encode(), "application/json"
    except (TypeError, ValueError) as error:
        raise RequestError(f"the sample cannot be sent as JSON: {error}") from None


def _key_header(info: ClusterInfo) -> dict[str, str]:
    from shoal.serve.builder import keys_path
    from shoal.serve.core.keys import read_keys

    keys_file = keys_path(info)
    return {} if keys_file is None else {"X-API-Key": read_keys(keys_file)[0]}


def _as_error(name: str, error: urllib.error.HTTPError) -> Exception:
    text = error.read(4000).decode(errors="replace")
    try:
        told = json.loads(text)["error"]
        text = f"{told['message']} {told['hint']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # not an app's refusal but HAProxy's or another program's: its text is shown as it came
    kind = AccessError if error.code in (401, 403) else RequestError if error.code < 500 else ClusterError
    return kind(f"app {name!r} answered {error.code}: {text}")
