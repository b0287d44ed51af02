"""What the tests of this room share: the machine they pretend to run on, and how they read a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from shoal.config import ClusterConfig, Machine

LAPTOP = Machine(num_cpus=2, memory_bytes=8 * 2**30)

Read: TypeAlias = Callable[..., ClusterConfig]
"""Loads a text: ``read(text, target=, overrides=, env=, machine=)``."""
