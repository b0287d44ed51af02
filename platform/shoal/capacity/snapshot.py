"""What Ray says is free, and waiting for it; this process must be attached to the cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from shoal.capacity import ray_edge
from shoal.capacity.policy import Holding, NodeFree, Resources, Snapshot, describe, grant
from shoal.config import Range
from shoal.errors import ClusterError, DeadlineExceeded, RequestError

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_HOLDERS_TIMEOUT_S = 5


def snapshot(*, with_holders: bool = False) -> Snapshot:
    """The cluster as it is now. ``with_holders`` also asks who holds what: up to seconds slower.

    Raises:
        ClusterError: the cluster does not answer.
    """
    import ray

    try:
        free = ray_edge.free_per_node()
        nodes = tuple(
            NodeFree(
                name=node["NodeName"],
                total=_countable(node["Resources"]),
                free=_countable(free.get(node["NodeID"], {})),
            )
            for node in ray.nodes()
            if node["Alive"]
        )
    except (ray.exceptions.RayError, OSError) as error:
        raise ClusterError(f"the cluster does not say what is free: {error}. See `shoal status`.") from error
    return Snapshot(nodes=nodes, held=_held() if with_holders else ())


def wait_for_grant(
    want: Callable[[], Range],
    per_worker: Resources,
    *,
    wait_s: float,
    hold_out_s: float = 0.0,
    stop: threading.Event | None = None,
    look: Callable[..., Snapshot] = snapshot,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """How many workers may start, as soon as the least that are wanted fit; blocks up to ``wait_s`` seconds.

    ``want`` is asked at every look: it may change meanwhile. For the first ``hold_out_s`` only the most that are
    wanted will do: for room that somebody is about to give back. Nothing is reserved: somebody else may take it
    before the workers are there. Returns 0 only when ``stop`` was set while waiting.

    Raises:
        RequestError: it could never fit.
        DeadlineExceeded: it did not fit in time; the message says who holds what.
        ClusterError: the cluster does not answer.
    """
    stop = stop or threading.Event()
    began = clock()
    while not stop.is_set():
        wanted = want()
        try:
            granted = grant(look(), wanted, per_worker)
        except RequestError:
            grant(look(with_holders=True), wanted, per_worker)  # raises again, and now says who holds what
            raise
        waited_s = clock() - began
        if granted and (granted == wanted.max or waited_s >= hold_out_s):
            return granted
        if waited_s >= wait_s:
            raise DeadlineExceeded(_still_full(look(with_holders=True), wanted, per_worker, wait_s))
        stop.wait(_POLL_S)
    return 0


def _still_full(seen: Snapshot, want: Range, per_worker: Resources, wait_s: float) -> str:
    need = ", ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    return (
        f"no room for {max(want.min, 1)} worker(s) with {need} each within {wait_s:g} s; "
        f"{describe(seen, per_worker)}. Stop something (`shoal stop NAME`), ask for less, or try again later."
    )


def _countable(resources: Resources) -> dict[str, float]:
    """Without the names Ray makes up for nodes, memory it does not enforce, and placement group bundles."""
    return {
        name: float(amount)
        for name, amount in resources.items()
        if "_group_" not in name and not name.startswith("node:") and name != "object_store_memory"
    }


def _held() -> tuple[Holding, ...]:
    """What is held and by whom, the most numerous first; empty when Ray's state API does not answer in time."""
    import ray.util
    from ray.util.state import list_actors

    counts: Counter[tuple[str, tuple[tuple[str, float], ...]]] = Counter()
    try:
        for actor in list_actors(
            filters=[("state", "=", "ALIVE")], detail=True, limit=1000, timeout=_HOLDERS_TIMEOUT_S
        ):
            if not actor.placement_group_id:
                counts[
                    _key(actor.name or actor.class_name or "an actor", actor.required_resources or {})
                ] += 1
        for group in ray.util.placement_group_table().values():
            if group["state"] == "CREATED":
                for bundle in group["bundles"].values():
                    counts[_key(group["name"] or "a placement group", bundle)] += 1
    except Exception:  # the state API raises many unrelated kinds; a message without holders is still true
        logger.warning("could not ask Ray who holds resources; the message will not name them", exc_info=True)
    return tuple(
        Holding(name=name, resources=dict(resources), count=count)
        for (name, resources), count in counts.most_common()
        if resources
    )


def _key(name: str, resources: Resources) -> tuple[str, tuple[tuple[str, float], ...]]:
    return name, tuple(sorted((what, amount) for what, amount in _countable(resources).items() if amount))
