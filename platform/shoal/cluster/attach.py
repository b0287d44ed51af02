"""Make this process a driver of a running cluster."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.cluster import ray_edge
from shoal.cluster.guest import runtime_environment
from shoal.cluster.info import ClusterInfo, check_versions, driver_environment
from shoal.errors import ClusterError

NAMESPACE = "shoal"
"""Ray namespace of everything shoal names on a cluster."""
ATTACH_DEADLINE_S = 60.0

_lock = threading.Lock()
_overwritten: dict[str, str | None] = {}
"""What `attach` found in the environment where it set something; None where there was nothing."""


def attach(info: ClusterInfo, *, timeout_s: float = ATTACH_DEADLINE_S) -> None:
    """Connect this process to the cluster as a Ray driver, quietly; blocks for up to ``timeout_s`` seconds.

    Sets the environment that Ray and Serve read (so child processes reach the same cluster). Safe to repeat;
    inside a Ray worker, which is connected already, it does nothing. ``detach`` undoes it, the environment too.

    Raises:
        ClusterError: the cluster is gone or does not answer, was started by other versions of Ray or Python,
            or this process is attached to another cluster.
    """
    with _lock:
        check_versions(info)
        if _is_attached(info):
            return
        if not info.is_alive():
            raise ClusterError(f"cluster {info.name!r} of {info.project} no longer runs. Start it: shoal up")
        _set_environment(driver_environment(info))
        import ray

        if not info.is_foreign:
            ray_edge.prepare_driver()
        with _connect_timeout(timeout_s):
            try:
                ray.init(
                    address=info.address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                    include_dashboard=None,
                    runtime_env=runtime_environment(info),
                )
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                _restore_environment()
                raise ClusterError(
                    f"cluster {info.name!r} at {info.address} does not let us attach: {error}. "
                    f"Look at it with `shoal doctor`; `shoal down && shoal up` starts it anew."
                ) from error


def detach() -> None:
    """Leave the cluster; what was started detached on it goes on. Safe to repeat."""
    import ray

    with _lock:
        ray.shutdown()
        _restore_environment()


def _set_environment(values: dict[str, str]) -> None:
    for name, value in values.items():
        # Only the first time: attached again after a plain ray.shutdown(), what is there is ours.
        _overwritten.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _restore_environment() -> None:
    """Else `connect` would take a cluster that is down for the one that this process is part of."""
    while _overwritten:
        name, value = _overwritten.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _is_attached(info: ClusterInfo) -> bool:
    """Whether this process is attached to that cluster; one that has not imported Ray is attached to none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    there = ray.get_runtime_context().gcs_address
    if there != info.address:
        raise ClusterError(
            f"this process is attached to the Ray cluster at {there}, not to {info.name!r} at "
            f"{info.address}. A process has one cluster at a time: leave that one with ray.shutdown(), "
            f"or use another process."
        )
    return True


@contextmanager
def _connect_timeout(timeout_s: float) -> Iterator[None]:
    """Bound the wait for a GCS that accepts and does not answer."""
    name = ray_edge.CONNECT_TIMEOUT_VARIABLE
    before = os.environ.get(name)
    os.environ[name] = str(max(1, int(timeout_s)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
