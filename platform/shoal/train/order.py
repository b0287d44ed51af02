"""Which samples step *k* trains on: a function of (seed, epoch, step) alone, never of the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shoal.train.seeds import derive_seed


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

    def positions(self, step: int, rank: int, world_size: int) -> range:
        """Positions in the sequence of rank's share of a step: contiguous, sizes differ by at most one."""
        start = step * self.batch_size
        begin = start + self.batch_size * rank // world_size
        return range(begin, start + self.batch_size * (rank + 1) // world_size)

    def epoch(self, number: int) -> list[int]:
        """The permutation of sample ids that is epoch ``number`` (from 0)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", number))
        ids: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return ids

    def batches(
        self, first_step: int, last_step: int, rank: int, world_size: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Rank's (position, sample id) pairs of each step in ``[first_step, last_step)``."""
        epoch_number, ids = -1, []
        for step in range(first_step, last_step):
            batch = []
            for position in self.positions(step, rank, world_size):
                if position // self.num_samples != epoch_number:
                    epoch_number = position // self.num_samples
                    ids = self.epoch(epoch_number)
                batch.append((position, ids[position % self.num_samples]))
            yield batch
