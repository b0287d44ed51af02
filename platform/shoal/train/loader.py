"""From samples to batches on the device, so that a resumed run sees exactly what the first would have."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from shoal.errors import RecipeError
from shoal.recipe import Datasets, Recipe
from shoal.train.order import DataOrder
from shoal.train.quarantine import Key, Quarantine
from shoal.train.seeds import derive_seed, seed_everything


def build_data(recipe: Recipe, seed: int) -> Datasets:
    """The recipe's data; a random split is the same one wherever the run's seed is the same.

    Whatever the recipe's code raises comes out as it is.
    """
    seed_everything(derive_seed(seed, "data"))
    return recipe.build_data()


def training_loader(
    data: Datasets,
    order: DataOrder,
    steps: range,
    shards: range,
    num_shards: int,
    *,
    left_out: Container[int],
    quarantine: Quarantine,
    pin_memory: bool,
    sample_seed: int,
) -> DataLoader[Any]:
    """Each of ``shards`` of the batch of each of ``steps`` but those ``left_out``, in this order, on the CPU."""
    if data.loader_workers > 0:
        dataset: Dataset[Any] = _Positioned(data.train, sample_seed)
        batches: Iterable[list[Any]] = _ShardBatches(order, steps, shards, num_shards, left_out, quarantine)
    else:  # random augmentation draws from this process's generators, seeded by step and shard
        dataset, batches = data.train, _IdBatches(order, steps, shards, num_shards, left_out, quarantine)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=data.collate or default_collate,
        num_workers=data.loader_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one of its own, a loader draws from the training's
    )


def load_again(
    data: Datasets, batch: list[Key], quarantine: Quarantine, *, begin: Callable[[], None], sample_seed: int
) -> Any:
    """A batch whose loading failed, loaded in this process with the random numbers that it has anyway.

    Raises:
        RecipeError: too many samples cannot be loaded.
    """
    dataset: Dataset[Any] = _Positioned(data.train, sample_seed) if data.loader_workers > 0 else data.train
    by_position = data.loader_workers > 0
    samples = quarantine.load(
        batch,
        begin=begin,
        take=lambda key: dataset[key if by_position else key[1]],
    )
    return (data.collate or default_collate)(samples)


def evaluation_loader(
    data: Datasets, dataset: Dataset[Any], share: range, batch_size: int
) -> DataLoader[Any]:
    """The samples ``share`` of a dataset in batches, in their order."""
    return DataLoader(
        Subset(dataset, share),
        batch_size=batch_size,
        collate_fn=data.collate or default_collate,
        generator=torch.Generator(),
    )


class _ShardBatches:
    """A batch sampler: (position, sample id) pairs, shard by shard and step by step."""

    def __init__(
        self,
        order: DataOrder,
        steps: range,
        shards: range,
        num_shards: int,
        left_out: Container[int],
        quarantine: Quarantine,
    ) -> None:
        self._order, self._steps, self._shards, self._num_shards = order, steps, shards, num_shards
        self._left_out, self._quarantine = left_out, quarantine

    def __iter__(self) -> Iterator[list[Any]]:
        steps = (step for step in self._steps if step not in self._left_out)
        return map(self._quarantine.applied, self._order.batches(steps, self._shards, self._num_shards))


class _IdBatches(_ShardBatches):
    """The sample ids alone: what the data set takes as it is, without a call of ours per sample."""

    def __iter__(self) -> Iterator[list[Any]]:
        return ([sample for _, sample in batch] for batch in super().__iter__())


class _Positioned(Dataset[Any]):
    """The training data by (position, sample id), for loader processes.

    There random augmentation is seeded by position, so a resumed run draws the same again.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, sample = key
        seed_everything(derive_seed(self._seed, position))
        return self._dataset[sample]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in a nest of dicts, lists and tuples to a device."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def batch_length(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    for item in items:
        return batch_length(item)
    raise RecipeError(f"cannot tell how many samples a batch of type {type(batch).__name__} holds")
