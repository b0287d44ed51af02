"""Processes that have imported torch before anyone asks: why a run starts in a second, not in ten.

A fresh worker process needs 2.5 to 4 CPU-seconds to import torch and Ray Train. Ray can start processes ahead
of need, but starts some only when a driver connects, never replaces those that were taken, and gives every
actor with a runtime environment of its own a fresh one. So we preload imports (``WARM_ENVIRONMENT``, read by
the raylet), keep what is idle, and replace what we take (`add_warm_processes`).
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

WARM_ENVIRONMENT: dict[str, str] = {
    # Imported by every waiting worker process; Ray skips a name that cannot be imported.
    "RAY_preload_python_modules": "shoal.cluster.preload",
    # Ray keeps as many idle processes as there are *free CPUs*, so a training run, which takes them all,
    # would lose the spare processes that its own recovery needs.
    "RAY_num_workers_soft_limit": "8",
    # Processes that may start at once; Ray's default is the number of cores, and a request for more than that
    # is cut down without a word.
    "RAY_worker_maximum_startup_concurrency": "8",
}
"""What a node's raylet must have in its environment before Ray starts there; `shoal up` merges it."""

# Beyond the soft limit, a spare process that nobody took goes away after this.
_KEEP_ALIVE_S = 600
_RPC_TIMEOUT_S = 5.0


def add_warm_processes(count: int) -> None:
    """Ask every node to start ``count`` worker processes ahead of need; returns at once.

    The caller must be attached to the cluster. They serve actors (and tasks) of any later job that has the
    runtime environment of this one. Best effort: without it everything works, slower; a failure is logged.
    """
    import ray

    for node in ray.nodes():
        if not node["Alive"]:
            continue
        try:
            _prestart(node, count, ray.get_runtime_context().get_runtime_env_string())
        except Exception:  # grpc's and Ray's errors share no base; only speed is lost
            logger.warning(
                "no warm processes on %s: runs start slower there", node["NodeName"], exc_info=True
            )


def _prestart(node: dict[str, Any], count: int, runtime_env: str) -> None:
    """The raylet's own call for it. There is no public one (checked in Ray 2.60.0; see the contract test)."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON, num_workers=count, keep_alive_duration_secs=_KEEP_ALIVE_S
    )
    request.runtime_env_info.serialized_runtime_env = runtime_env
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_RPC_TIMEOUT_S)
    finally:
        channel.close()
