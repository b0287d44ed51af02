"""Ray Serve's declarative REST interface: what should run is sent whole, what runs is read back."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shoal.errors import AccessError, ClusterError

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

_PATH = "/api/serve/applications/"
_TIMEOUT_S = 120.0
"""Serve's first start takes some seconds, on a busy machine many."""
MAX_ANSWER_BYTES = 16 * 2**20

# No proxy: an http_proxy in the environment would be asked for 127.0.0.1.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

BROKEN = (OSError, http.client.HTTPException, ValueError)
"""What a call and its reading raise when nobody answers, or breaks off half way: HTTP and JSON have errors apart."""


_NUM_TRIES = 3
"""Serve's first start fails when the machine is so busy that its proxy is not ready in time; the next succeeds."""


class _ServeFailed(ClusterError):
    """Serve failed while it handled the request, which may be sent again."""


def read_serve(info: ClusterInfo) -> dict[str, Any]:
    """What Serve runs: Ray's `ServeInstanceDetails` as a mapping; only ``applications`` before Serve starts.

    Raises:
        ClusterError: the dashboard does not answer.
        AccessError: it does not accept the cluster's token.
    """
    content = _call(info, "GET", None)
    try:
        details: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise _silent(info, error) from None
    return details


def write_serve(info: ClusterInfo, config: Mapping[str, Any]) -> None:
    """Make ``config`` (Ray's `ServeDeploySchema`) what Serve runs; declarative apps not in it are deleted.

    Starts Serve if it does not run yet. Returns when the controller has it, before anything has changed.

    Raises:
        ClusterError: it was not accepted, or the dashboard does not answer.
        AccessError: the cluster's token is not accepted.
    """
    body = json.dumps(config).encode()
    for tries_left in range(_NUM_TRIES - 1, -1, -1):
        try:
            _call(info, "PUT", body)
            return
        except _ServeFailed:
            if not tries_left:
                raise


def _call(info: ClusterInfo, method: str, body: bytes | None) -> bytes:
    if info.is_foreign:
        raise ClusterError("apps need a cluster that shoal started (shoal up); this job only visits one")
    try:
        token = info.token_path.read_text().strip()
    except OSError as error:
        raise ClusterError(
            f"cluster {info.name!r} has no readable token in {info.token_path} ({error.strerror}). "
            "Is it still running? See: shoal status"
        ) from None
    request = urllib.request.Request(
        info.dashboard_url + _PATH,
        data=body,
        method=method,
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    try:
        with OPENER.open(request, timeout=_TIMEOUT_S) as response:
            content: bytes = response.read(MAX_ANSWER_BYTES)
            return content
    except urllib.error.HTTPError as error:
        text = error.read(4000).decode(errors="replace").strip()
        if error.code in (401, 403):
            raise AccessError(f"cluster {info.name!r} does not accept its own token: {text}") from None
        kind = _ServeFailed if error.code >= 500 else ClusterError
        raise kind(f"Serve on cluster {info.name!r} refused the request ({error.code}): {text}") from None
    except BROKEN as error:
        raise _silent(info, error) from None


def _silent(info: ClusterInfo, error: Exception) -> ClusterError:
    return ClusterError(
        f"the dashboard of cluster {info.name!r} at {info.dashboard_url} does not answer ({error}). "
        "See: shoal status"
    )
