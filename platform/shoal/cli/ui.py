"""``shoal ui``: MLflow's page on this cluster's runs and models."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.command import CLUSTER, command
from shoal.cli.console import say
from shoal.cli.interrupt import sigterm_interrupts
from shoal.cli.project import require_running
from shoal.errors import ClusterError, TrackingError

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo

READY_DEADLINE_S = 90.0
"""MLflow takes some 5 s to start, several times that on a busy machine."""
_POLL_S = 0.2
_HOST = "127.0.0.1"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, panel=CLUSTER, examples=("shoal ui", "shoal ui --port 5000"))(ui)


def ui(
    port: Annotated[int, typer.Option(metavar="N", help="Where the page is; 0 picks a free port.")] = 0,
) -> None:
    """Show runs and models in MLflow's page, on this machine only, until Ctrl-C.

    Where cluster.yaml names a tracking server, it prints that server's address instead.
    """
    info = require_running()
    if info.tracking.startswith(("http://", "https://")):
        say(f"tracking is a server of its own: {info.tracking}")
        return
    _wait_for_store(info)
    port = port or _free_port()
    with sigterm_interrupts(), _server(info, port) as (server, log):
        _wait_for_page(server, port, log)
        say(f"http://{_HOST}:{port}  (Ctrl-C ends it)")
        server.wait()


@contextmanager
def _server(info: ClusterInfo, port: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """MLflow's server, and the file it writes its log to; ended on exit."""
    folder = info.storage / "tracking"
    log = folder / "ui.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            server_command(info, port),
            env={**os.environ, **SERVER_ENVIRONMENT},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us; we end MLflow and its workers
        )
    try:
        yield server, log
    finally:
        _end(server)


SERVER_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else it starts a queue and its workers
}


def server_command(info: ClusterInfo, port: int) -> list[str]:
    """The command line of MLflow's server on the cluster's own store."""
    artifacts = info.storage / "tracking" / "artifacts"
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", _HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", info.tracking),
        # Without these MLflow makes ./mlruns and ./mlartifacts wherever it is started.
        *("--default-artifact-root", artifacts.as_uri(), "--artifacts-destination", artifacts.as_uri()),
        *("--allowed-hosts", f"{_HOST}:{port},localhost:{port}"),
    ]


def _wait_for_store(info: ClusterInfo) -> None:
    """Wait until the cluster's tracker has opened the store: two that migrate it crash."""
    from shoal.cluster import attach
    from shoal.tracking import ensure_tracker

    attach(info)
    tracker = ensure_tracker(info)
    say("waiting for the tracker to open the store")
    deadline = time.monotonic() + READY_DEADLINE_S
    while (seen := tracker.status()).state == "starting":
        if time.monotonic() > deadline:
            raise TrackingError(f"the tracker did not open {info.tracking} within {READY_DEADLINE_S:.0f} s")
        time.sleep(_POLL_S)
    if seen.state == "error":
        raise TrackingError(f"the tracker cannot use {info.tracking}: {seen.error}")


def _wait_for_page(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while server.poll() is None:
        try:
            with socket.create_connection((_HOST, port), timeout=1.0):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"MLflow's page did not answer on port {port} within {READY_DEADLINE_S:.0f} s"
                ) from None
            time.sleep(_POLL_S)
    said = log.read_text(errors="replace")[-2000:].strip()
    raise ClusterError(f"MLflow's page did not start (exit code {server.returncode}):\n{said}")


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
