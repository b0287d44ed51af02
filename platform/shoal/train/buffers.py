"""What a model keeps besides its parameters (BatchNorm's running means), held equal on every worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


class Buffers:
    """Every shard of a step starts from the step's buffers; the step ends with the mean of what they became.

    (torch's DistributedDataParallel takes rank 0's instead; they must then be sent before every step, and are lost
    with rank 0.) The mean is weighted by samples, and of the *changes*, which are summed with the gradients: so a
    buffer that nobody changes keeps its bits. Of buffers that are no floating-point numbers (BatchNorm counts its
    batches) each worker keeps its last shard's: the same everywhere as long as they depend on the number of
    batches alone. With a single shard nothing is done, but for `rewind` where ``rewinds`` says that it is needed.
    """

    def __init__(self, model: nn.Module, num_shards: int, *, rewinds: bool = False) -> None:
        self._is_summed = num_shards > 1
        self._is_kept = self._is_summed or rewinds or not any(True for _ in model.buffers())
        buffers = list(model.buffers()) if self._is_summed or rewinds else []
        self._floats = _by_dtype(b for b in buffers if b.is_floating_point())
        self._others = [b for b in buffers if not b.is_floating_point()]
        self._floats_before = [_flat(same) for same in self._floats]
        self._others_before = [buffer.clone() for buffer in self._others]
        self.riders = (
            {same[0].dtype: sum(b.numel() for b in same) for same in self._floats} if self._is_summed else {}
        )
        """How many numbers of each dtype are summed with the gradients."""

    @property
    def can_rewind(self) -> bool:
        """Whether what `rewind` needs is kept, or there is nothing that it would change."""
        return self._is_kept

    def begin(self, index: int) -> None:
        """Before the forward pass of this worker's ``index``-th part of a step."""
        if index == 0:
            self._floats_before = [_flat(same) for same in self._floats]
            self._others_before = [buffer.clone() for buffer in self._others]
        else:
            self.rewind()

    def ride(self, rider: Mapping[torch.dtype, torch.Tensor], weight: float) -> None:
        """After that forward pass: add what it changed to what is summed; ``weight`` is the part's share."""
        if not self._is_summed:
            return
        for same, before in zip(self._floats, self._floats_before, strict=True):
            after = _flat(same)
            origin = _origin(before)
            change = torch.where(after == origin, torch.zeros_like(after), (after - origin) * weight)
            rider[before.dtype].add_(change)

    def land(self, rider: Mapping[torch.dtype, torch.Tensor]) -> None:
        """After the step: ``rider`` holds the sums."""
        if not self._is_summed:
            return
        for same, before in zip(self._floats, self._floats_before, strict=True):
            _spread(_origin(before) + rider[before.dtype], same)

    def rewind(self) -> None:
        """Put back what the buffers were at the step's beginning."""
        for same, before in zip(self._floats, self._floats_before, strict=True):
            _spread(before, same)
        for buffer, before in zip(self._others, self._others_before, strict=True):
            buffer.copy_(before)


def _by_dtype(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _origin(before: torch.Tensor) -> torch.Tensor:
    """From where changes are counted: 0 where a buffer is infinite yet, as a running maximum begins."""
    return torch.where(before.isfinite(), before, torch.zeros_like(before))


def _spread(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))
