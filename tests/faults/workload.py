"""What is trained: small, with everything that a resume can get wrong, and told of at every forward pass."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import shoal
from faults import inject
from faults.plan import Fault
from shoal.train.engine import train_worker
from shoal.train.group import Group
from shoal.train.session import Session
from shoal.train.spec import RunSpec

STEPS = 12
BATCH_SIZE = 20
NUM_SAMPLES = 60
EVAL_EVERY = 4


class Traced(shoal.Recipe):
    """Dropout, BatchNorm, AdamW and a schedule; every sample carries its number."""

    objective = shoal.minimize("loss")
    batch_size: int = BATCH_SIZE
    eval_every: int = EVAL_EVERY

    def build_data(self) -> shoal.Datasets:
        inject.reach("begin")
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(90, 6, generator=generator)
        y = (x[:, 0] + x[:, 1] > 0).long()
        parts = (slice(NUM_SAMPLES), slice(NUM_SAMPLES, 80), slice(80, 90))
        train, val, test = (TensorDataset(x[part], y[part], torch.arange(90)[part]) for part in parts)
        return shoal.Datasets(train=train, val=val, test=test)

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 2)
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.02)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y, _ = batch
        return nn.functional.cross_entropy(model(x), y)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y, _ = batch
        _trace.evaluating()
        return {"accuracy": (model(x).argmax(1) == y).float().mean()}

    def train(self, session: Session) -> None:
        _trace.begin(session)
        for batch in session.batches():
            loss = session.loss(batch)
            _trace.saw(batch[2].tolist())
            inject.reach("forward", session.steps_done)
            session.backward(loss)
            inject.reach("sum", session.steps_done)
            session.step()


class _Trace:
    """This process's words to the arena, through a pipe: what was killed has said them, and no limit tears them."""

    def __init__(self) -> None:
        self._pipe = -1
        self._attempt = self._rank = 0
        self._session: Session | None = None

    def through(self, pipe: int) -> None:
        self._pipe = pipe

    def enter(self, attempt: int, rank: int, armed: int) -> None:
        self._attempt, self._rank, self._session = attempt, rank, None
        self.say(armed=armed)

    def begin(self, session: Session) -> None:
        self._session = session
        self.say(begin=session.steps_done, workers=session.group.size)
        middle = session.model[1].weight  # type: ignore[index]
        middle.register_hook(lambda _: inject.reach("backward", session.steps_done))
        session.optimizer.register_step_post_hook(lambda *_: inject.reach("optimizer", session.steps_done))

    def saw(self, ids: list[int]) -> None:
        assert self._session is not None
        self.say(step=self._session.steps_done, ids=ids)

    def evaluating(self) -> None:
        if self._session is not None:  # else the run catches up with what an attempt before could not measure
            inject.reach("evaluate", self._session.steps_done)

    def say(self, **what: Any) -> None:
        line = json.dumps({"attempt": self._attempt, "rank": self._rank, **what}) + "\n"
        os.write(self._pipe, line.encode())  # shorter than PIPE_BUF: lines of several processes do not mix


_trace = _Trace()


def tell_through(pipe: int) -> None:
    """In a worker process: this is the way to the arena."""
    _trace.through(pipe)


def work(config: dict[str, Any]) -> None:
    """What a worker does in every generation, as `train_on_worker` does on a cluster."""
    armed = json.loads(Path(config["armed"]).read_text())
    spec: RunSpec = config["spec"]
    group = Group.current()
    _trace.enter(armed["attempt"], group.rank, armed["index"])
    mine = [fault for fault in armed["faults"] if fault["rank"] == group.rank]
    inject.arm(Fault(**mine[0]) if mine else None)
    train_worker(spec, group)
    _trace.say(writes=inject.num_writes())
