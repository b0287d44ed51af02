"""``cluster.yaml``: read, checked and documented. Needs pydantic and yaml, neither Ray nor torch."""

from shoal.config.checks import notes
from shoal.config.load import FILE_NAME, find, load
from shoal.config.local import LocalPlan, LocalPool, plan_local
from shoal.config.machine import Machine
from shoal.config.reference import json_schema
from shoal.config.sections import (
    ClusterConfig,
    Head,
    Pool,
    Reserve,
    Security,
    Serve,
    Targets,
    Train,
    Tune,
    is_loopback,
)
from shoal.config.values import Duration, Gpus, Interval, Range, Size

__all__ = [
    "FILE_NAME",
    "ClusterConfig",
    "Duration",
    "Gpus",
    "Head",
    "Interval",
    "LocalPlan",
    "LocalPool",
    "Machine",
    "Pool",
    "Range",
    "Reserve",
    "Security",
    "Serve",
    "Size",
    "Targets",
    "Train",
    "Tune",
    "find",
    "is_loopback",
    "json_schema",
    "load",
    "notes",
    "plan_local",
]
