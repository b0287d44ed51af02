"""The private name of Ray that looking for room leans on; ``tests/capacity/test_capacity_ray_edge.py`` checks it."""

from __future__ import annotations

from collections.abc import Mapping


def free_per_node() -> Mapping[str, Mapping[str, float]]:
    """What nobody holds, by node id and resource; this process must be attached to the cluster.

    Ray's public ``available_resources`` sums over nodes, which would promise a 2-CPU worker to two nodes with one
    free CPU each. Raises Ray's own errors when the cluster does not answer.
    """
    from ray._private.state import available_resources_per_node

    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return free
