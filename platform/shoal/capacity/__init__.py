"""Who gets what: how many workers a run may start now, next to everything else on the cluster.

Deciding is `grant`, a function of a `Snapshot`, and `next_size` while a run trains; `snapshot` and `wait_for_grant`
are the edge to Ray.
"""

from shoal.capacity.elastic import Steady, next_size, restart_range
from shoal.capacity.policy import Holding, NodeFree, Resources, Snapshot, ceiling, describe, grant, room
from shoal.capacity.snapshot import snapshot, wait_for_grant

__all__ = [
    "Holding",
    "NodeFree",
    "Resources",
    "Snapshot",
    "Steady",
    "ceiling",
    "describe",
    "grant",
    "next_size",
    "restart_range",
    "room",
    "snapshot",
    "wait_for_grant",
]
