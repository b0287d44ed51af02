"""What the cluster becomes on target ``local``, where one machine stands in for the head and every pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.config.machine import Machine

if TYPE_CHECKING:
    from shoal.config.sections import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class LocalPool:
    """A pool as this machine stands in for it."""

    num_cpus: int
    """CPUs it may use; the pools share them, they do not add up."""
    num_gpus: int
    """GPUs it may use; 0 also where the file has GPUs and this machine has none."""

    @property
    def max_workers(self) -> int:
        """The most workers it can hold: one for each GPU, or for each CPU where it has no GPU."""
        return self.num_gpus or self.num_cpus


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """What ``shoal up`` starts on this machine."""

    num_cpus: int
    """Logical CPUs that Ray hands out: ``targets.local.cpu``, or what the machine has."""
    num_gpus: int
    """GPUs that Ray hands out: those of the machine that some pool asks for."""
    memory_bytes: int
    """Memory of the machine."""
    pools: Mapping[str, LocalPool]
    notes: tuple[str, ...]
    """What was dropped or cut down to fit, as sentences for a person."""


def plan_local(config: ClusterConfig, machine: Machine) -> LocalPlan:
    """Fold the head and every pool of ``config`` onto ``machine``.

    Never fails: what the machine lacks is left out and named in ``notes``. Whether what is left is
    enough for the other sections is for ``checks`` to say.
    """
    cpus = config.targets.local.cpu or machine.num_cpus
    notes = []
    if cpus > machine.num_cpus:
        notes.append(f"targets.local.cpu: {cpus} logical CPUs share the {machine.num_cpus} of this machine")
    pools = {}
    for name, pool in config.pools.items():
        wanted = pool.max_gpus
        pools[name] = LocalPool(num_cpus=cpus, num_gpus=min(wanted, machine.num_gpus))
        if wanted > machine.num_gpus:
            has = f"has {machine.num_gpus}" if machine.num_gpus else "has none: its workers run on CPUs"
            notes.append(f"pools.{name}: up to {count(wanted, 'GPU')} in the file, this machine {has}")
    limit = max(pools[config.train.pool].max_workers if config.train.pool in pools else cpus, 1)
    if config.train.workers.max > limit >= config.train.workers.min:
        notes.append(f"train.workers: {config.train.workers} asked for, at most {limit} fit on this machine")
    gpus = max((pool.num_gpus for pool in pools.values()), default=0)
    return LocalPlan(
        num_cpus=cpus, num_gpus=gpus, memory_bytes=machine.memory_bytes, pools=pools, notes=tuple(notes)
    )


def count(number: float, noun: str) -> str:
    """``1 GPU``, ``2 GPUs``."""
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
