"""What a model keeps besides its parameters (BatchNorm's running means), held equal on every worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from shoal.train.group import Group


class Buffers(Protocol):
    """How a step begins and ends for a model's buffers."""

    @property
    def riders(self) -> Mapping[torch.dtype, int]:
        """How many numbers of each dtype are summed with the gradients."""
        ...

    def begin(self, index: int) -> None:
        """Before the forward pass of this rank's ``index``-th part of a step."""
        ...

    def ride(self, rider: Mapping[torch.dtype, torch.Tensor], weight: float) -> None:
        """After that forward pass: add what it changed to what is summed; ``weight`` is the part's share."""
        ...

    def land(self, rider: Mapping[torch.dtype, torch.Tensor]) -> None:
        """After the step: ``rider`` holds the sums."""
        ...

    def share(self) -> None:
        """Make every rank's buffers those that a checkpoint would hold."""
        ...


class FirstRanks:
    """Every step starts from rank 0's buffers, as torch's DistributedDataParallel does it."""

    riders: Mapping[torch.dtype, int] = {}

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._group = group
        self._by_dtype = _by_dtype(model.buffers()) if group.size > 1 else []

    def begin(self, index: int) -> None:
        self.share()

    def ride(self, rider: Mapping[torch.dtype, torch.Tensor], weight: float) -> None:
        pass

    def land(self, rider: Mapping[torch.dtype, torch.Tensor]) -> None:
        pass

    def share(self) -> None:
        for same_kind in self._by_dtype:
            flat = torch.cat([buffer.reshape(-1) for buffer in same_kind])
            self._group.broadcast(flat)
            _spread(flat, same_kind)


class Merged:
    """Every shard starts from the step's buffers; the step ends with the mean of what the shards made of them.

    The mean is weighted by samples and of the *changes*, summed in the tree's order: so a buffer that nobody
    changes keeps its bits. Of buffers that are no floating-point numbers (BatchNorm counts its batches) each worker
    keeps what its last shard left: the same everywhere as long as it depends on the number of batches alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._floats = _by_dtype(b for b in model.buffers() if b.is_floating_point())
        self._others = [b for b in model.buffers() if not b.is_floating_point()]
        self._floats_before = [torch.empty(0)] * len(self._floats)
        self._others_before = [torch.empty(0)] * len(self._others)
        self.riders = {same[0].dtype: sum(b.numel() for b in same) for same in self._floats}

    def begin(self, index: int) -> None:
        if index == 0:
            self._floats_before = [_flat(same) for same in self._floats]
            self._others_before = [buffer.clone() for buffer in self._others]
        else:
            for same, flat in zip(self._floats, self._floats_before, strict=True):
                _spread(flat, same)
            for buffer, before in zip(self._others, self._others_before, strict=True):
                buffer.copy_(before)

    def ride(self, rider: Mapping[torch.dtype, torch.Tensor], weight: float) -> None:
        for same, before in zip(self._floats, self._floats_before, strict=True):
            after = _flat(same)
            change = torch.where(after == before, torch.zeros_like(after), (after - before) * weight)
            rider[before.dtype].add_(change)

    def land(self, rider: Mapping[torch.dtype, torch.Tensor]) -> None:
        for same, before in zip(self._floats, self._floats_before, strict=True):
            _spread(before + rider[before.dtype], same)

    def share(self) -> None:
        pass


def _by_dtype(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _spread(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))
