"""A fingerprint of the data a run sees, so that resuming on other data is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from shoal.recipe import Datasets
from shoal.train.seeds import seed_everything

NUM_PROBES = 64
"""Samples looked at in each split, evenly spaced. Other samples may change unnoticed; reading all of a
large data set at every start would cost more than it tells."""

NUM_TRIES = 3
"""Of a sample of the training data."""


def fingerprint(data: Datasets) -> str:
    """Sixteen hex digits over each split's length and `NUM_PROBES` of its samples.

    Samples that are augmented at random are taken with fixed seeds: the global generators are others afterwards.
    """
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        dataset = getattr(data, split)
        length = len(dataset) if dataset is not None else 0
        digest.update(f"{split}:{length}".encode())
        for index in sorted({length * i // NUM_PROBES for i in range(NUM_PROBES)} if length else ()):
            _feed(digest, _probe(dataset, index, may_fail=split == "train"))
    return digest.hexdigest()[:16]


def _probe(dataset: Any, index: int, *, may_fail: bool) -> Any:
    """A sample; of one that cannot be loaded, and will be replaced while the run trains, that it cannot.

    The first must be there: a data set that cannot be read at all is a mistake in the recipe.
    """
    for tries_left in reversed(range(NUM_TRIES)):
        seed_everything(index)
        try:
            return dataset[index]
        except Exception:
            if not may_fail or index == 0:
                raise
            if not tries_left:
                return "cannot be loaded"
    raise AssertionError("unreachable")


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data if array.numel() else b"")
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, bytes):
        digest.update(value)
    elif value is None or isinstance(value, str | int | float | bool):
        digest.update(repr(value).encode())
    else:  # an image or another object: its type is all that is certain without running its code
        digest.update(type(value).__name__.encode())
