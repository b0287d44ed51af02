"""What the sections of a config owe each other, on the target and the machine that were chosen.

Pure: a config and a machine go in, problems come out. Nothing is started or looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.config.local import count, plan_local
from shoal.config.machine import Machine
from shoal.config.sections import NOT_YET, ClusterConfig, Section, is_loopback
from shoal.errors import Problem, did_you_mean


@dataclass(frozen=True)
class Finding:
    """A problem between sections, and the fields that it was concluded from.

    When one of those is itself wrong, the conclusion is worthless and ``load`` drops it.
    """

    problem: Problem
    reads: tuple[str, ...]


@dataclass(frozen=True)
class _Capacity:
    """The most that some part of the cluster can ever have."""

    cpus: int
    gpus: int
    of: str
    """Whose capacity it is, as the subject of a sentence."""
    memory_bytes: int | None = None
    """None where the file does not say."""
    raise_by: str = ""
    """The setting that gives more; empty where none can."""

    def advice(self, verb: str) -> str:
        """What to do about wanting more than this."""
        return f"{verb} less or raise {self.raise_by}" if self.raise_by else f"{verb} less"


def check(config: ClusterConfig, machine: Machine) -> list[Finding]:
    """Every problem between sections, in the order of the file; empty when the config can run."""
    return [
        *_check_workers(config, machine),
        *_check_serve_access(config),
        *_check_reserve(config, machine),
        *_check_target(config),
    ]


def notes(config: ClusterConfig) -> list[str]:
    """Settings that were read and checked but that nothing acts on yet, as sentences.

    Only what the file or an override sets is named, never a default; so call it on what ``load`` returned.
    """
    found = [f"{path}: checked, but nothing acts on it yet" for path in _fields_not_yet("", config)]
    if config.target != "local":
        found.insert(0, f"target: {config.target} is checked, but only local can be started yet")
    return found


def _fields_not_yet(path: str, section: Section) -> Iterator[str]:
    """Dotted paths of the fields marked ``NOT_YET`` that someone set."""
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        value, extra = getattr(section, name), field.json_schema_extra
        if isinstance(extra, dict) and extra.get(NOT_YET):
            yield f"{path}{name}"
        elif isinstance(value, Section):
            yield from _fields_not_yet(f"{path}{name}.", value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from _fields_not_yet(f"{path}{name}.{key}.", inner)


def _check_workers(config: ClusterConfig, machine: Machine) -> Iterator[Finding]:
    pool, workers = config.train.pool, config.train.workers
    if pool is not None and pool not in config.pools:
        known = f"pools are {', '.join(sorted(config.pools))}" if config.pools else "the file has no pools"
        hint = did_you_mean(pool, config.pools, cutoff=0.7)  # gpu is not a misspelt cpu
        problem = Problem("train.pool", f"no such pool; {known}{hint}", repr(pool))
        yield Finding(problem, ("train.pool", f"pools.{pool}"))
        return
    capacity = _worker_capacity(config, machine)
    most = capacity.gpus or capacity.cpus
    # On this machine a range may reach beyond what there is: the file describes a larger cluster too.
    wanted = workers.min if config.target == "local" else workers.max
    if wanted > most:
        has = count(most, "GPU" if capacity.gpus else "CPU")
        message = (
            f"{count(wanted, 'worker')} can never run: {capacity.of} has {has}, one for each worker; "
            f"{capacity.advice('ask for')}"
        )
        reads = ("train.workers", "train.pool", "pools", "head", "target", "targets.local")
        yield Finding(Problem("train.workers", message, str(workers)), reads)


def _check_serve_access(config: ClusterConfig) -> Iterator[Finding]:
    if not is_loopback(config.serve.host) and config.serve.keys_file is None:
        message = "others could reach the apps without a key; set serve.keys_file, or bind 127.0.0.1"
        problem = Problem("serve.host", message, repr(config.serve.host))
        yield Finding(problem, ("serve.host", "serve.keys_file"))


def _check_reserve(config: ClusterConfig, machine: Machine) -> Iterator[Finding]:
    reserve, capacity = config.serve.reserve, _cluster_capacity(config, machine)
    reads = ("serve.reserve", "pools", "head", "target", "targets.local")
    for field, wanted, most in (
        ("cpu", reserve.cpu, capacity.cpus),
        ("gpu", reserve.gpu, capacity.gpus),
        ("memory", reserve.memory, capacity.memory_bytes),
    ):
        if field != "cpu" and config.target == "local":
            capacity = replace(capacity, raise_by="")  # only CPUs can be more than the machine has
        if most is not None and wanted > most:
            is_memory = field == "memory"
            has = f"{most / 2**30:.1f}Gi" if is_memory else count(most, field.upper())
            message = f"more than there is: {capacity.of} has {has} in all; {capacity.advice('reserve')}"
            shown = str(wanted) if is_memory else f"{wanted:g}"
            yield Finding(Problem(f"serve.reserve.{field}", message, shown), reads)


def _check_target(config: ClusterConfig) -> Iterator[Finding]:
    if config.target != "local" and getattr(config.targets, config.target) is None:
        message = f"this target needs its settings; add targets.{config.target}, or choose local"
        problem = Problem("target", message, repr(config.target))
        yield Finding(problem, ("target", f"targets.{config.target}"))


def _worker_capacity(config: ClusterConfig, machine: Machine) -> _Capacity:
    """What training can ever have; in a pool with GPUs each worker holds one of them."""
    pool = config.train.pool
    if pool is None:
        return replace(_cluster_capacity(config, machine), gpus=0)
    if config.target == "local":
        num_gpus = plan_local(config, machine).pools[pool].num_gpus
        if not num_gpus:
            return replace(_cluster_capacity(config, machine), gpus=0)
        return _Capacity(machine.num_cpus, num_gpus, of=f"pool {pool} on this machine")
    spec = config.pools[pool]
    return _Capacity(spec.max_cpus, spec.max_gpus, of=f"pool {pool}", raise_by=f"pools.{pool}.nodes")


def _cluster_capacity(config: ClusterConfig, machine: Machine) -> _Capacity:
    if config.target == "local":
        plan = plan_local(config, machine)
        return _Capacity(plan.num_cpus, plan.num_gpus, "target local", plan.memory_bytes, "targets.local.cpu")
    pools = config.pools.values()
    memories = [pool.nodes.max * pool.memory for pool in pools if pool.memory is not None]
    return _Capacity(
        cpus=config.head.cpu + sum(pool.max_cpus for pool in pools),
        gpus=sum(pool.max_gpus for pool in pools),
        memory_bytes=config.head.memory + sum(memories) if len(memories) == len(pools) else None,
        of="the cluster",
        raise_by="the nodes of a pool",
    )
