"""The workers of one run as each of them sees the others: a thin face of ``torch.distributed``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The defaults of its functions are the group that exists when it is imported. torch.optim imports it late, and the
# group then outlives destroy_process_group: its threads still run while the interpreter ends, and one that wants the
# GIL then aborts the process (SIGABRT of a rank whose run had finished, torch 2.13).
import torch.distributed.nn.functional

from shoal.errors import PeerLost
from shoal.train.pulse import heart

COLLECTIVE_TIMEOUT_S = 120.0
"""How long a collective waits for the slowest rank before it fails; torch's own default is 30 minutes."""


@dataclass(frozen=True)
class Group:
    """Rank, number of workers and device, and the few collectives a run needs (no-ops for one worker).

    Raises (from every collective):
        PeerLost: another worker is gone or did not answer in ``COLLECTIVE_TIMEOUT_S``.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device | None = None) -> Group:
        """One worker, in this process."""
        return cls(0, 1, device or default_device())

    @classmethod
    def current(cls) -> Group:
        """The group of this process: torch.distributed's if it is initialised, else one worker alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls.alone()
        return cls(dist.get_rank(), dist.get_world_size(), default_device())

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes the run's record and checkpoints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> None:
        """Add ``tensor`` over all ranks, in place. Blocks."""
        if self.size > 1:
            with _peer_errors(), heart.waiting:
                dist.all_reduce(tensor)

    def start_sum(self, tensor: torch.Tensor) -> dist.Work | None:
        """Begin adding ``tensor`` over all ranks, in place; wait with `finish`."""
        if self.size == 1:
            return None
        with _peer_errors():
            work: dist.Work = dist.all_reduce(tensor, async_op=True)
            return work

    def start_exchange(
        self, received: torch.Tensor, sent: torch.Tensor, *, receives: list[int], sends: list[int]
    ) -> dist.Work:
        """Begin to send each rank its slice of ``sent`` and to receive one from each; wait with `finish`.

        Both are flat; ``sends`` and ``receives`` are the slices' lengths by rank.
        """
        with _peer_errors():
            work: dist.Work = dist.all_to_all_single(received, sent, receives, sends, async_op=True)
            return work

    def start_gather(self, whole: torch.Tensor, mine: torch.Tensor) -> dist.Work:
        """Begin to put every rank's ``mine`` into ``whole``, rank by rank; wait with `finish`. Equal lengths."""
        with _peer_errors():
            work: dist.Work = dist.all_gather_single(whole, mine, async_op=True)
            return work

    def finish(self, work: dist.Work | None) -> None:
        """Block until what a ``start_...`` began is done."""
        if work is not None:
            with _peer_errors(), heart.waiting:
                work.wait()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite ``tensor`` with rank 0's. Blocks."""
        if self.size > 1:
            with _peer_errors(), heart.waiting:
                dist.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank, on every rank. Blocks.

        Pickles between workers of one run, which run the same code: no trust boundary is crossed.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peer_errors(), heart.waiting:
            dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank. Blocks. Other ranks' values are ignored."""
        if self.size == 1:
            return value
        box = [value]
        with _peer_errors(), heart.waiting:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def leave(self) -> None:
        """Close the process group, so that ranks waiting for this one fail at once instead of at the timeout."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def default_device() -> torch.device:
    """This worker's GPU if there is one (``LOCAL_RANK`` chooses under torchrun), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def torchrun_group() -> Iterator[Group]:
    """The group that ``torchrun`` describes in the environment (one worker where it does not).

    Joins on entry, leaves on exit.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield Group.current()
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        yield Group.current()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def transport_errors() -> Iterator[None]:
    """Turn what torch raises when a peer is lost into `PeerLost`, where collectives are its own and not a `Group`'s.

    Anything else passes. Known by what gloo and NCCL write into their messages: torch has no type for it.
    """
    try:
        yield
    except RuntimeError as err:
        if isinstance(err, dist.DistError) or any(name in str(err) for name in ("gloo", "NCCL")):
            raise PeerLost(f"a worker stopped answering ({str(err).splitlines()[0][:200]})") from err
        raise


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:  # torch raises DistBackendError, DistNetworkError and plain RuntimeError here
        raise PeerLost(f"a worker stopped answering ({str(err).splitlines()[0][:200]})") from err
