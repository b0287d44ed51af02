"""Ask a cluster's dashboard: plain HTTP with the cluster's token, without importing Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.errors import AccessError, ClusterError

TIMEOUT_S = 5.0
MAX_ROWS = 10_000
"""Ray's own limit of a state listing."""
_MAX_BYTES = 64 * 2**20


def get(url: str, path: str, token_path: Path) -> Any:
    """The JSON answer of a dashboard to ``GET path``; waits for up to `TIMEOUT_S`.

    Raises:
        AccessError: it refuses the token.
        ClusterError: it does not answer, or not with JSON.
    """
    import http.client  # here, because these load TLS and mail parsing, 50 ms, for every `shoal --help`
    import urllib.request

    # No proxy: an http_proxy in the environment would be asked for 127.0.0.1.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        headers = {"Authorization": f"Bearer {token_path.read_text()}"}
        with opener.open(urllib.request.Request(url + path, headers=headers), timeout=TIMEOUT_S) as response:
            return json.loads(response.read(_MAX_BYTES))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise AccessError(
                f"the cluster at {url} refuses the token in {token_path} ({error.code}). "
                f"Its own is named in .shoal/cluster.json of its project; `shoal env` prints it."
            ) from error
        raise ClusterError(
            f"the cluster at {url} answers {path} with {error.code}. Next: shoal doctor"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ClusterError(f"the cluster at {url} does not answer ({error}). Next: shoal doctor") from error


def rows(url: str, resource: str, token_path: Path) -> list[dict[str, Any]]:
    """Every row of a state listing: ``actors``, ``placement_groups``, ``nodes``.

    Raises:
        AccessError, ClusterError: as ``get``.
    """
    answer = get(url, f"/api/v0/{resource}?detail=1&limit={MAX_ROWS}", token_path)
    return list(answer["data"]["result"]["result"])
