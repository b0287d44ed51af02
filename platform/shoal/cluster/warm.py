"""Processes that have imported torch before anyone asks: why a run starts in a second, not in ten.

A fresh worker process needs 2.5 to 4 CPU-seconds to import torch and Ray Train. Ray can start processes ahead
of need, but starts some only when a driver connects, never replaces those that were taken, and gives every
actor with a runtime environment of its own a fresh one. So we preload imports (`ray_edge.WARM_ENVIRONMENT`,
read by the raylet), keep what is idle, and replace what we take (`add_warm_processes`).
"""

from __future__ import annotations

import logging

from shoal.cluster import ray_edge

logger = logging.getLogger(__name__)

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
            ray_edge.prestart_workers(
                f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
                count,
                keep_alive_s=_KEEP_ALIVE_S,
                timeout_s=_RPC_TIMEOUT_S,
            )
        except Exception:  # grpc's and Ray's errors share no base; only speed is lost
            logger.warning(
                "no warm processes on %s: runs start slower there", node["NodeName"], exc_info=True
            )
