"""A toy whose workers are resized at steps that a test chose, and which notes the samples that each step saw."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Collection
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

import shoal
from shoal.tracking import RunRecord
from shoal.train.boundary import RunBoundary
from toy import Toy
from waiting import wait_until


class ElasticToy(Toy):
    """Set ``resizes`` and ``record`` of the class before it trains; rank 0 orders, as a driver would.

    In the steps of ``poison`` rank 0's loss is NaN; in ``die_at_step`` it dies.
    """

    resizes = None
    record = None
    poison = ()
    die_at_step = None
    has_checkpoints = False
    unreadable = ()
    memory = None
    memory_in = ""

    def build_data(self) -> shoal.Datasets:
        data = super().build_data()
        return shoal.Datasets(train=_Partly(_numbered(data.train), self.unreadable), val=_numbered(data.val))

    def allocate(self, where: str, session: shoal.Session, batch: Any) -> None:
        """Find no memory, from step 5 on, where the batch is too large for rank 1."""
        is_too_much = self.memory is not None and len(batch[0]) > self.memory
        if is_too_much and where == self.memory_in and session.group.rank == 1 and session.steps_done >= 5:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            )

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch[:2])

    def metrics(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return super().metrics(model, batch[:2])

    def train(self, session: shoal.Session) -> None:
        record: RunRecord = self.record
        seen: dict[int, list[int]] = {}
        if self.memory is not None:
            session.model[0].weight.register_hook(lambda grad: self.allocate("backward", session, batch))
            session.optimizer.register_step_post_hook(lambda *_: self.allocate("optimizer", session, batch))
        for batch in session.batches():
            step = session.steps_done
            seen.setdefault(step, []).extend(batch[2].tolist())
            if session.group.is_first and step in self.resizes:
                record.resizing.order(record.attempt, self.resizes[step])
            if step == self.die_at_step:
                self._die()
            self.allocate("forward", session, batch)
            loss = session.loss(batch)
            session.backward(loss * math.nan if step in self.poison and session.group.is_first else loss)
            session.step()
        file = record.dir / f"seen-{record.attempt}-{session.group.rank}"
        file.write_text("".join(f"{step} {' '.join(map(str, ids))}\n" for step, ids in seen.items()))

    def _die(self) -> None:
        if self.has_checkpoints:
            wait_until(
                lambda: any(self.record.checkpoints_dir.glob("step-*")), "a first checkpoint is committed"
            )
        os.kill(os.getpid(), signal.SIGKILL)


def samples_by_step(record: RunRecord) -> dict[int, list[int]]:
    """The samples that each step saw, sorted, over all attempts and ranks."""
    seen: dict[int, list[int]] = {}
    for file in record.dir.glob("seen-*"):
        for line in file.read_text().splitlines():
            step, *ids = map(int, line.split())
            seen.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in sorted(seen.items())}


def die_at(moment: str) -> None:
    """Have this process die by SIGKILL at a moment of a resize."""
    if moment == "ordered":
        _die_in("_save", after=False)
    elif moment == "committed":
        _die_in("_is_committed", after=True)
    elif moment == "written":
        _die_in("_write_last_line", after=True)


def _die_in(method: str, *, after: bool) -> None:
    original = getattr(RunBoundary, method)

    def dying(self: RunBoundary, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs) if after or self._resize_to is None else None
        if self._resize_to is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(RunBoundary, method, dying)


class _Partly(Dataset[Any]):
    """Some of whose samples cannot be loaded."""

    def __init__(self, data: TensorDataset, unreadable: Collection[int]) -> None:
        self._data, self._unreadable = data, unreadable

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        if index in self._unreadable:
            raise OSError(f"no such picture: {index}")
        return self._data[index]


def _numbered(data: Dataset[Any]) -> TensorDataset:
    assert isinstance(data, TensorDataset)
    return TensorDataset(*data.tensors, torch.arange(len(data)))
