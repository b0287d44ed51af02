"""How many workers a run gets, as a function of what is free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shoal.config import Range
from shoal.errors import RequestError

Resources = Mapping[str, float]
"""Ray resource names with amounts, such as ``{"CPU": 1.0, "GPU": 0.5}``."""

# Ray counts in units of 1/10000: 0.1 + 0.2 free must satisfy 0.3 asked.
_RAY_UNITS = 10_000


@dataclass(frozen=True, kw_only=True)
class NodeFree:
    """One living machine: what it has, and what nobody holds at the moment."""

    name: str
    total: Resources
    free: Resources


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What all that bear one name hold, for messages only."""

    name: str
    """An actor's, else its class; a placement group's."""
    resources: Resources
    """What each of them holds."""
    count: int = 1
    """How many of this name hold that much."""

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{times}{self.name} ({_listing(self.resources)}{' each' if times else ''})"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The cluster at one moment. What others hold is missing from ``free``, whoever they are."""

    nodes: tuple[NodeFree, ...]
    held: tuple[Holding, ...] = ()

    @property
    def total(self) -> dict[str, float]:
        """What the cluster has, over all nodes."""
        return _sum(node.total for node in self.nodes)

    @property
    def available(self) -> dict[str, float]:
        """What nobody holds, over all nodes."""
        return _sum(node.free for node in self.nodes)


def grant(snapshot: Snapshot, want: Range, per_worker: Resources) -> int:
    """How many workers may start now: as many as fit into what is free, at most ``want.max``.

    A worker never spans two nodes, so what fits is counted per node. 0 means: not now, the cluster
    could do it but others hold what is needed.

    Raises:
        RequestError: ``want.min`` workers do not fit even into an empty cluster.
    """
    least = max(want.min, 1)
    most_ever = ceiling(snapshot, per_worker)
    if most_ever < least:
        raise RequestError(_impossible(snapshot, least, most_ever, per_worker))
    fits_now = min(room(snapshot, per_worker), want.max)
    return int(fits_now) if fits_now >= least else 0


def ceiling(snapshot: Snapshot, per_worker: Resources) -> float:
    """How many workers would fit if nobody else held anything; ``inf`` where a worker needs nothing."""
    return sum(_fits(node.total, per_worker) for node in snapshot.nodes)


def room(snapshot: Snapshot, per_worker: Resources) -> float:
    """How many more workers fit into what is free; ``inf`` where a worker needs nothing."""
    return sum(_fits(node.free, per_worker) for node in snapshot.nodes)


def describe(snapshot: Snapshot, per_worker: Resources) -> str:
    """One line for a person: what is free of what there is, and who holds the rest."""
    total, available = snapshot.total, snapshot.available
    names = [name for name, amount in per_worker.items() if amount > 0] or ["CPU"]
    free = ", ".join(f"{available.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}" for name in names)
    relevant = [holding for holding in snapshot.held if any(map(holding.resources.get, names))]
    if relevant:
        return f"free: {free}; held by: {'; '.join(map(str, relevant))}"
    # Holders are asked for only when they matter, and Ray may not know them: then nothing is said of them.
    is_all_free = all(available.get(name, 0.0) >= total.get(name, 0.0) for name in names)
    return f"free: {free}" + ("; held by: nobody" if is_all_free else "")


def _fits(amounts: Resources, per_worker: Resources) -> float:
    """How many workers these amounts hold; ``inf`` where a worker needs nothing."""
    counts = [
        _units(amounts.get(name, 0.0)) // _units(need)
        for name, need in per_worker.items()
        if _units(need) > 0
    ]
    return min(counts, default=math.inf)


def _units(amount: float) -> int:
    return round(amount * _RAY_UNITS)


def _impossible(snapshot: Snapshot, least: int, most_ever: float, per_worker: Resources) -> str:
    total, nodes = snapshot.total, len(snapshot.nodes)
    has = ", ".join(f"{total.get(name, 0.0):g} {name}" for name, need in per_worker.items() if need > 0)
    return (
        f"{least} worker{'s' if least > 1 else ''} with {_listing(per_worker)} each can never start: the "
        f"cluster has {has} on {nodes} node{'s' if nodes != 1 else ''}, room for {most_ever:g} (now "
        f"{describe(snapshot, per_worker)}). Ask for fewer or smaller workers, or enlarge the pool in "
        f"cluster.yaml."
    )


def _listing(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"


def _sum(parts: Iterable[Resources]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total
