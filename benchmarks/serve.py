"""Requests per second of the digits app, side by side with the same model on plain Ray Serve.

    python -m benchmarks.serve [--rounds 8] [--seconds 2]

All run on this machine with one replica and one torch thread, and take turns: each round sends the same JSON
to each for some seconds over 32 connections. Printed is the ratio with its 95 % interval. shoal has everything on:
API key, checks, limits, batching, metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shoal
from benchmarks.cluster import ROOT, own_cluster
from benchmarks.load import Load, run_load
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio

GOALS = {"stock": 5.0, "by hand": 0.8}
"""Lower bounds for shoal's requests/s over the peer's, JSON bodies. The other peers are printed for information.

`stock` is Ray's default proxy with the one setting that 32 connections need: with all its defaults (`stock default`)
Ray's router backs off for up to 0.5 s when more than 5 requests per replica wait, and answers a tenth as many.
"""

CLUSTER = """
version: 1
name: bench
head: {cpu: 4, memory: 2Gi}
storage: storage
serve: {port: 0, replicas: 1, batch_wait: 0s, keys_file: keys}
targets: {local: {cpu: 4}}
"""


@dataclass(frozen=True)
class Peer:
    """One server to send requests to."""

    name: str
    port: int
    path: str


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    asked = parser.parse_args()
    key = secrets.token_urlsafe(32)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(own_cluster(CLUSTER, {"keys": key}))
        peers = _behind_haproxy(cluster)
        peers += stack.enter_context(_stock(cluster.info.storage))
        met = True
        wait_until_idle()
        for kind, body, content_type in (("JSON", _json(), "application/json"), ("PNG", _png(), "image/png")):
            rounds = [
                {
                    peer.name: run_load(
                        peer.port,
                        peer.path,
                        body,
                        content_type,
                        seconds=asked.seconds,
                        headers={"X-API-Key": key},
                    )
                    for peer in peers
                }
                for _ in range(asked.rounds + 1)
            ][1:]  # the first round warms up
            met &= _print(kind, rounds)
    return 0 if met else 1


def _json() -> bytes:
    return json.dumps({"pixels": [[0, 0, 0, 8, 14, 0, 0, 0]] * 8}).encode()


def _png() -> bytes:
    from PIL import Image

    page = Image.new("L", (64, 64), 255)
    page.paste(0, (28, 6, 36, 58))
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def _behind_haproxy(cluster: shoal.Cluster) -> list[Peer]:
    """The digits app, and beside it, on the same HAProxy, the hand-written peers."""
    from shoal.serve.rest import read_serve, write_serve
    from shoal.tracking.actor import open_registry

    info = cluster.info
    resolved = open_registry(info).register("digits", write_package_at)
    app = cluster.serve("serve_apps.digits:app", model="digits@1")
    config = read_serve(info)["applications"]["digits"]["deployed_app_config"]
    by_hand = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": f"benchmarks.serve_peers:{name}",
            "args": {"package": str(resolved.path)},
        }
        for name in ("tuned", "batched")
    ]
    http_options = {"host": "127.0.0.1", "port": info.serve_port}
    write_serve(info, {"http_options": http_options, "applications": [config, *by_hand]})
    _wait_answers([f"{app.url}/{name}" for name in ("tuned", "batched")])
    port = info.serve_port
    return [
        Peer("shoal", port, "/predict"),
        Peer("by hand", port, "/tuned"),
        Peer("by hand, batched", port, "/batched"),
    ]


@contextlib.contextmanager
def _stock(storage: Path) -> Iterator[list[Peer]]:
    """Ray's default proxy needs a cluster without shoal's environment."""
    package = storage / "models" / "digits" / "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SHOAL_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", "benchmarks.serve_peers", str(package), str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip() == "ready":
                    break
            else:
                raise SystemExit("the stock peers did not start")
            yield [Peer("stock", port, "/tuned"), Peer("stock default", port, "/default")]
        finally:
            process.stdin.close()
            process.wait(60)


def _wait_answers(urls: list[str]) -> None:
    import time
    import urllib.request

    deadline = time.monotonic() + 120
    for url in urls:
        request = urllib.request.Request(url, data=_json(), headers={"Content-Type": "application/json"})
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).read()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{url} does not answer: {error}") from None
                time.sleep(0.2)


def _print(kind: str, rounds: list[dict[str, Load]]) -> bool:
    print(f"\n{kind}, 32 connections, {len(rounds)} rounds")
    print(f"{'':18}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}   shoal / peer (95 %)")
    met = True
    for name in rounds[0]:
        loads = [each[name] for each in rounds]
        line = f"{name:18}{statistics.fmean(load.requests_per_s for load in loads):12.0f}"
        line += f"{statistics.median(load.p50_ms for load in loads):9.1f}"
        line += f"{statistics.median(load.p99_ms for load in loads):9.1f}{sum(load.num_errors for load in loads):8}"
        if name != "shoal":
            ratio = paired_ratio(
                [each["shoal"].requests_per_s for each in rounds],
                [each[name].requests_per_s for each in rounds],
            )
            line += f"   {ratio}"
            if kind == "JSON" and name in GOALS:
                line += f"   goal {GOALS[name]}: {'met' if ratio.low >= GOALS[name] else 'NOT MET'}"
                met &= ratio.low >= GOALS[name]
        print(line, flush=True)
    return met


def write_package_at(directory: Path, version: int) -> Any:
    """An untrained digits model: what it says does not matter here."""
    import torch

    from jobs.digits import Digits
    from shoal.models import Lineage, write_package

    torch.manual_seed(0)
    lineage = Lineage(
        recipe="jobs.digits:Digits",
        fields={},
        data_fingerprint="",
        code_revision="",
        run="untrained",
        trial=None,
        checkpoint_step=0,
        metrics={},
        created=0.0,
    )
    weights = Digits().build_model().state_dict()
    return write_package(directory, weights, model="digits", version=version, lineage=lineage)


if __name__ == "__main__":
    sys.exit(main())
