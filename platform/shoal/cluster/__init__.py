"""One Ray cluster of one project: start it, find it, attach to it, look at it, stop it."""

from shoal.cluster.info import ClusterInfo, differences, environment, find
from shoal.cluster.lifecycle import down, up

__all__ = ["ClusterInfo", "differences", "down", "environment", "find", "up"]
