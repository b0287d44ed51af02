"""Between workers: how the sums that each of them made of its part of a step become the sum of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from shoal.train.group import Group
from shoal.train.tree import Node, combine, nodes_of, share_of


@dataclass(frozen=True)
class Pending:
    """One buffer under way: ``flat`` will hold the sum."""

    flat: torch.Tensor
    work: torch.distributed.Work | None
    received: torch.Tensor | None = None
    """Everybody's sums of this rank's slice, rank by rank; None when ``work`` alone makes the sum."""


class Exchange(Protocol):
    """Sums buffers over the ranks of a group. Every rank starts the same buffers in the same order."""

    multiple: int
    """A buffer's length must be a multiple of this."""
    is_remote: bool
    """False when this rank is the only one."""

    def start(self, flat: torch.Tensor, saved: Sequence[torch.Tensor]) -> Pending:
        """Begin to sum ``saved`` and ``flat`` (in this order the nodes that this rank holds) into ``flat``."""
        ...

    def finish(self, pending: Sequence[Pending]) -> None:
        """Block until every ``flat`` holds its sum."""
        ...


class AllReduce:
    """The library's own sum, the fastest there is: its order depends on the number of ranks."""

    multiple = 1

    def __init__(self, group: Group) -> None:
        self._group = group
        self.is_remote = group.size > 1

    def start(self, flat: torch.Tensor, saved: Sequence[torch.Tensor]) -> Pending:
        assert not saved, "a rank has one part of a step"
        return Pending(flat, self._group.start_sum(flat))

    def finish(self, pending: Sequence[Pending]) -> None:
        for each in pending:
            self._group.finish(each.work)


class TreeSum:
    """The sum over virtual shards in the order of `tree`: the same bits on any number of ranks.

    Each rank sends the others their slices of the nodes that it holds, adds up those of its own slice, and
    shares the result. With one node per rank that is what a ring all-reduce sends, ``2 (n-1)/n`` buffers per rank;
    a rank whose shards make k nodes sends ``(k+1) (n-1)/n``. Two ranks with one node each leave a single addition,
    which has no order (IEEE 754 addition commutes), so there the library's faster all-reduce does it.
    """

    def __init__(self, group: Group, num_shards: int) -> None:
        self._group = group
        self._num_shards = num_shards
        self._nodes = [
            nodes_of(share_of(rank, group.size, num_shards), num_shards) for rank in range(group.size)
        ]
        self._is_one_addition = [len(nodes) for nodes in self._nodes] == [1, 1]
        self.is_remote = group.size > 1
        self.multiple = group.size

    def start(self, flat: torch.Tensor, saved: Sequence[torch.Tensor]) -> Pending:
        if not self.is_remote:
            return Pending(flat, None)
        # Of 16-bit numbers the library rounds the sum in its own way.
        if self._is_one_addition and flat.dtype.itemsize >= 4:
            return Pending(flat, self._group.start_sum(flat))
        size = self._group.size
        slice_size = flat.numel() // size
        held = [*saved, flat]
        sent = torch.stack([each.view(size, slice_size) for each in held], dim=1) if saved else flat
        counts = [len(nodes) * slice_size for nodes in self._nodes]
        received = torch.empty(sum(counts), dtype=flat.dtype, device=flat.device)
        work = self._group.start_exchange(
            received, sent.view(-1), receives=counts, sends=[len(held) * slice_size] * size
        )
        return Pending(flat, work, received)

    def finish(self, pending: Sequence[Pending]) -> None:
        shared = []
        for each in pending:
            self._group.finish(each.work)
            if each.received is not None:
                shared.append(self._group.start_gather(each.flat, self._add(each.received)))
        for work in shared:
            self._group.finish(work)

    def _add(self, received: torch.Tensor) -> torch.Tensor:
        order = [node for nodes in self._nodes for node in nodes]
        sums: dict[Node, torch.Tensor] = dict(zip(order, received.view(len(order), -1), strict=True))
        return combine(sums, self._num_shards, lambda left, right: left + right)
