"""Who gets what: how many workers a run may start now, next to everything else on the cluster.

Deciding is `grant`, a function of a `Snapshot`; `snapshot` and `wait_for_grant` are the edge to Ray.
"""

from shoal.capacity.policy import Holding, NodeFree, Resources, Snapshot, ceiling, describe, grant
from shoal.capacity.snapshot import snapshot, wait_for_grant

__all__ = [
    "Holding",
    "NodeFree",
    "Resources",
    "Snapshot",
    "ceiling",
    "describe",
    "grant",
    "snapshot",
    "wait_for_grant",
]
