"""A look at a running cluster: what it has, what is free, who holds what."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.cluster import dashboard, processes, ray_edge
from shoal.cluster.info import ClusterInfo

RESOURCES = ("CPU", "GPU", "memory")
"""What a person asks for; Ray's internal resources are left out. Memory is in bytes."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Somebody who holds part of the cluster until he gives it back."""

    kind: Literal["actor", "placement group"]
    name: str
    """The actor's name, else its class; the placement group's name, else its id."""
    resources: Mapping[str, float]
    """What it holds; empty for an actor inside a placement group, which holds for it."""


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """A cluster at one moment."""

    info: ClusterInfo
    uptime_s: float
    total: Mapping[str, float]
    free: Mapping[str, float]
    """Exact where this process is attached to the cluster; else up to 5 s old."""
    holders: Sequence[Holder]
    num_processes: int


def status(info: ClusterInfo) -> ClusterStatus:
    """Look at the cluster now; takes about 0.1 s and changes nothing.

    Raises:
        ClusterError: it does not answer.
        AccessError: it refuses the token.
    """
    url, token = info.dashboard_url, info.token_path
    nodes = [row for row in dashboard.rows(url, "nodes", token) if row["state"] == "ALIVE"]
    total = _sum(_public(node["resources_total"]) for node in nodes)
    groups = [
        _group(row) for row in dashboard.rows(url, "placement_groups", token) if row["state"] == "CREATED"
    ]
    actors = [_actor(row) for row in dashboard.rows(url, "actors", token) if row["state"] == "ALIVE"]
    return ClusterStatus(
        info=info,
        uptime_s=max(0.0, time.time() - info.started),
        total=total,
        free=_free(info, total),
        holders=[*groups, *actors],
        num_processes=len(processes.find(info.cluster_id)),
    )


def _free(info: ClusterInfo, total: Mapping[str, float]) -> dict[str, float]:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().gcs_address == info.address:
        available = ray.available_resources()
        return {name: float(available.get(name, 0.0)) for name in total}
    answer = dashboard.get(info.dashboard_url, ray_edge.STATUS_PATH, info.token_path)
    report = answer["data"]["clusterStatus"] or {}
    usage = report.get("loadMetricsReport", {}).get("usage", {})
    return {name: amount - usage.get(name, (0.0, 0.0))[0] for name, amount in total.items()}


def _actor(row: Mapping[str, Any]) -> Holder:
    inside_group = row["placement_group_id"] is not None
    return Holder(
        kind="actor",
        name=row["name"] or row["class_name"],
        resources={} if inside_group else _public(row["required_resources"]),
    )


def _group(row: Mapping[str, Any]) -> Holder:
    return Holder(
        kind="placement group",
        name=row["name"] or row["placement_group_id"],
        resources=_sum(_public(bundle["unit_resources"]) for bundle in row["bundles"]),
    )


def _public(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: float(resources[name]) for name in RESOURCES if resources.get(name)}


def _sum(parts: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total
