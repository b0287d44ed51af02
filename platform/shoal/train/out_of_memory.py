"""What to do when a step does not fit into memory: the batch stays, and fewer of its samples go at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.errors import CorruptError
from shoal.storage import read_json, write_json

FILE = "micro_batch.json"


class StepGivenUp(BaseException):
    """A peer ran out of memory in this step: nobody takes it. Raised through the recipe's loop, for the engine."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator found no memory, on the CPU or a GPU. (What the kernel kills for memory just dies.)"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def num_parts(batch_size: int, num_workers: int, micro_batch: int | None) -> int:
    """Into how many parts a worker divides its share, so that each has ``micro_batch`` samples at most.

    One for None. Never so many that a part would be empty.
    """
    if micro_batch is None:
        return 1
    largest_share = -(-batch_size // num_workers)
    return min(-(-largest_share // micro_batch), batch_size // num_workers)


def halved(batch_size: int, num_workers: int, parts: int) -> int | None:
    """The samples of a micro-batch when ``parts`` are doubled; None where they cannot be fewer than now."""
    more = min(2 * parts, batch_size // num_workers)
    now, then = largest_part(batch_size, num_workers, parts), largest_part(batch_size, num_workers, more)
    return then if then < now else None


def largest_part(batch_size: int, num_workers: int, parts: int) -> int:
    """The most samples that go through the model at a time."""
    return -(-batch_size // (num_workers * parts))


def read_micro_batch(folder: Path) -> int | None:
    """What is recorded in a run's folder; None where it never ran out of memory.

    Raises:
        CorruptError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    found = read_json(path)
    samples = found.get("samples") if isinstance(found, dict) else None
    if not isinstance(samples, int) or samples < 1:
        raise CorruptError(
            f"{path} is damaged: it names no number of samples. Move it away, and it is found out anew."
        )
    return samples


def write_micro_batch(folder: Path, samples: int) -> None:
    """Remember it for whoever goes on with the run.

    Raises:
        StorageError: it cannot be written.
    """
    write_json(folder / FILE, {"samples": samples})
