"""Which samples step *k* trains on: a function of (seed, epoch, step) alone, never of the number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from shoal.train.seeds import derive_seed
from shoal.train.tree import share_of


@dataclass(frozen=True)
class DataOrder:
    """The endless sequence of sample ids: one seeded permutation of the data set after the other.

    Step *k* takes positions ``[k * batch_size, (k + 1) * batch_size)`` of that sequence, so every sample of
    every epoch is used exactly once and a batch may span two epochs.
    """

    num_samples: int
    batch_size: int
    """Samples per step over all workers."""
    seed: int

    def positions(self, step: int, shard: int, num_shards: int) -> range:
        """Positions in the sequence of a shard of a step: contiguous, sizes differ by at most one."""
        start = step * self.batch_size
        share = share_of(shard, num_shards, self.batch_size)
        return range(start + share.start, start + share.stop)

    def epoch(self, number: int) -> list[int]:
        """The permutation of sample ids that is epoch ``number`` (from 0)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", number))
        ids: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return ids

    def batches(
        self, steps: Iterable[int], shards: range, num_shards: int
    ) -> Iterator[list[tuple[int, int]]]:
        """The (position, sample id) pairs of each of ``shards`` of each step, in this order."""
        epoch_number, ids = -1, []
        for step in steps:
            for shard in shards:
                batch = []
                for position in self.positions(step, shard, num_shards):
                    if position // self.num_samples != epoch_number:
                        epoch_number = position // self.num_samples
                        ids = self.epoch(epoch_number)
                    batch.append((position, ids[position % self.num_samples]))
                yield batch

    def samples(self, step: int) -> list[int]:
        """The sample ids of a step's whole batch, in its order."""
        (batch,) = self.batches((step,), range(1), 1)
        return [sample for _, sample in batch]
