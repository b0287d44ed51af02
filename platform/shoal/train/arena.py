"""Memory that a process reuses for every snapshot and that its background writer reads, without a copy."""

from __future__ import annotations

import mmap
import os

import torch


class Arena:
    """Shared memory without a name: it is gone with the last process that holds it. Grows, and never shrinks."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("shoal-snapshot", os.MFD_CLOEXEC)
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size_bytes: int) -> torch.Tensor:
        """The first ``size_bytes`` as a flat tensor of bytes. What it returned earlier is the same memory."""
        if size_bytes > len(self._bytes):
            os.ftruncate(self.descriptor, size_bytes)
            self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, size_bytes), dtype=torch.uint8)
        return self._bytes[:size_bytes]

    def close(self) -> None:
        """Give up the descriptor; tensors in it stay valid."""
        os.close(self.descriptor)
