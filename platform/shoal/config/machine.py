"""What this machine has: the input of every check against target ``local``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Machine:
    """CPUs, memory and GPUs of one machine."""

    num_cpus: int
    memory_bytes: int
    num_gpus: int = 0

    @classmethod
    def here(cls) -> Self:
        """Count what this process may use, container limits included; loads no GPU library."""
        num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cpu_limit, memory_limit = _container_limits()
        return cls(
            num_cpus=min(num_cpus, cpu_limit or num_cpus),
            memory_bytes=min(memory_bytes, memory_limit or memory_bytes),
            num_gpus=_count_gpus(os.environ),
        )


def _container_limits(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int | None]:
    """CPUs (rounded up) and bytes that this container is held to; None for no limit.

    Reads cgroup v2 alone; a v1 host counts as unlimited. Format: kernel.org, admin-guide/cgroup-v2.
    """

    def words(name: str) -> list[str]:
        file = cgroup / name
        return file.read_text().split() if file.is_file() else ["max"]

    quota, *period = words("cpu.max")
    memory = words("memory.max")[0]
    return (
        None if quota == "max" else math.ceil(int(quota) / int(period[0])),
        None if memory == "max" else int(memory),
    )


def _count_gpus(env: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA device files, at most as many as ``CUDA_VISIBLE_DEVICES`` lets through."""
    present = sum(1 for node in devices.glob("nvidia*") if node.name.removeprefix("nvidia").isdecimal())
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # CUDA stops at the first invalid entry; -1 is the usual way to hide all.
    names = [name.strip() for name in visible.split(",")]
    allowed = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(present, allowed)
