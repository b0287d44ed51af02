"""One Ray cluster of one project: start it, find it, attach to it, look at it, stop it. Loads no Ray."""

from shoal.cluster.attach import NAMESPACE, attach, detach
from shoal.cluster.doctor import Finding, doctor
from shoal.cluster.guest import this_cluster
from shoal.cluster.info import ClusterInfo, differences, environment, find
from shoal.cluster.lifecycle import down, up
from shoal.cluster.status import ClusterStatus, Holder, status

__all__ = [
    "NAMESPACE",
    "ClusterInfo",
    "ClusterStatus",
    "Finding",
    "Holder",
    "attach",
    "detach",
    "differences",
    "doctor",
    "down",
    "environment",
    "find",
    "status",
    "this_cluster",
    "up",
]
