"""The thin edge to Ray: the tracker as a detached actor, and the registry behind it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from shoal.cluster import NAMESPACE
from shoal.errors import ShoalError, TrackingError
from shoal.storage import Storage
from shoal.tracking.registry import RegisteredModel, Registry, ResolvedModel
from shoal.tracking.tracker import Tracker, TrackerStatus

ACTOR_NAME = "tracker"
CALL_TIMEOUT_S = 60.0
"""Covers a tracker that is being restarted and opens its store (7 s here) while training has every core."""
_RETRY_S = 0.2


class TrackerPlace(Protocol):
    """What of a `ClusterInfo` says where the tracker works."""

    @property
    def storage(self) -> Path: ...
    @property
    def tracking(self) -> str: ...


class TrackerActor:
    """A `Tracker` in a process of its own. Errors travel as values: Ray would wrap them in its traceback."""

    def __init__(self, storage: str, uri: str) -> None:
        os.nice(19)  # MLflow takes 7 CPU-seconds to open a new store; training must not wait for that
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # we say it ourselves, once
        self._tracker = Tracker(Storage(Path(storage)), uri)
        self._tracker.start()

    def call(self, method: str, arguments: Mapping[str, Any]) -> tuple[Any, ShoalError | None]:
        """What a method of the registry, or ``status`` or ``flush``, returned or raised."""
        try:
            target = self._tracker if method in ("status", "flush") else self._tracker.registry
            return getattr(target, method)(**arguments), None
        except ShoalError as error:
            return None, error.with_traceback(None)

    def pid(self) -> int:
        """The tracker's process."""
        return os.getpid()


class TrackerClient:
    """The cluster's tracker, from any process attached to the cluster; a `RegistryBackend`.

    Ray restarts a tracker that dies, and calls that met its death are made again: each of its methods may be
    repeated. Raises TrackingError when there is no answer within ``timeout_s``.
    """

    def __init__(self, handle: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    def status(self) -> TrackerStatus:
        """How far delivery is."""
        status: TrackerStatus = self._call("status")
        return status

    def flush(self) -> TrackerStatus:
        """Deliver now what waits, and say how far it got."""
        status: TrackerStatus = self._call("flush")
        return status

    def reserve(self, model: str, *, writer: Mapping[str, Any], run: str | None) -> int:
        version: int = self._call("reserve", model=model, writer=writer, run=run)
        return version

    def mark_ready(self, model: str, version: int) -> None:
        self._call("mark_ready", model=model, version=version)

    def abandon(self, model: str, version: int) -> None:
        self._call("abandon", model=model, version=version)

    def set_alias(self, model: str, alias: str, version: int) -> None:
        self._call("set_alias", model=model, alias=alias, version=version)

    def resolve(self, spec: str) -> ResolvedModel:
        resolved: ResolvedModel = self._call("resolve", spec=spec)
        return resolved

    def versions(self, model: str) -> list[ResolvedModel]:
        versions: list[ResolvedModel] = self._call("versions", model=model)
        return versions

    def models(self) -> list[RegisteredModel]:
        models: list[RegisteredModel] = self._call("models")
        return models

    def _call(self, method: str, **arguments: Any) -> Any:
        import ray

        deadline = time.monotonic() + self._timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                value, error = ray.get(self._handle.call.remote(method, arguments), timeout=left_s)
            except ray.exceptions.GetTimeoutError:
                raise self._silent(method, "it is there, but gave no answer") from None
            except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as gone:
                if left_s <= _RETRY_S:
                    raise self._silent(method, str(gone)) from gone
                time.sleep(_RETRY_S)
                continue
            if error is not None:
                raise error
            return value

    def _silent(self, method: str, why: str) -> TrackingError:
        return TrackingError(
            f"the cluster's tracker did not answer {method!r} within {self._timeout_s:g} s: {why}. "
            "Try again; if it stays so, look at `shoal status`"
        )


def ensure_tracker(place: TrackerPlace, *, timeout_s: float = CALL_TIMEOUT_S) -> TrackerClient:
    """The cluster's one tracker, started if there is none; this process must be attached to the cluster.

    It is detached (it outlives this process), takes no CPU from the cluster's count, and comes back when its
    process dies. Does not wait until it is ready. ``timeout_s`` bounds each call of the client.

    Raises:
        TrackingError: the cluster cannot start it.
    """
    import ray

    try:
        handle = (
            ray.remote(TrackerActor)
            .options(
                name=ACTOR_NAME,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=4,  # a slow delivery must not hold up `status` or the registry
            )
            .remote(str(place.storage), place.tracking)
        )
    except (ray.exceptions.RayError, ValueError) as error:
        raise TrackingError(f"the cluster cannot start its tracker: {error}. See `shoal status`") from error
    return TrackerClient(handle, timeout_s=timeout_s)


def open_registry(place: TrackerPlace) -> Registry:
    """The cluster's model registry, for a process attached to the cluster."""
    return Registry(ensure_tracker(place), Storage(place.storage))
