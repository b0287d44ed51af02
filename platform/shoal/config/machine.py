"""What this machine has: the input of every check against target ``local``."""

from __future__ import annotations

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
        """Count what this process may use on this machine; loads no GPU library."""
        return cls(
            num_cpus=len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            num_gpus=_count_gpus(os.environ),
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
