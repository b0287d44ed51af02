"""Run one run under torchrun, as a test's subprocess: ``trainee.py STORAGE NAME STEPS [KILL_RANK KILL_STEP]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import shoal
from shoal.storage import Storage
from shoal.train.engine import train_worker
from shoal.train.group import torchrun_group
from shoal.train.spec import RunSpec


class Toy(shoal.Recipe):
    """A recipe with everything that a resume can get wrong: dropout, BatchNorm, momentum, a schedule."""

    objective = shoal.maximize("accuracy")
    batch_size: int = 12
    eval_every: int = 20
    lr: float = 0.05
    kill_rank: int = -1
    kill_step: int = -1

    def build_data(self) -> shoal.Datasets:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(100, 8, generator=generator)
        y = (x[:, 0] + x[:, 1] > 0).long()
        return shoal.Datasets(train=TensorDataset(x[:70], y[:70]), val=TensorDataset(x[70:], y[70:]))

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Dropout(0.3), nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 2)
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    def loss(self, model: nn.Module, batch: object) -> torch.Tensor:
        x, y = batch  # type: ignore[misc]
        return nn.functional.cross_entropy(model(x), y)

    def metrics(self, model: nn.Module, batch: object) -> dict[str, torch.Tensor]:
        x, y = batch  # type: ignore[misc]
        return {"accuracy": (model(x).argmax(1) == y).float().mean()}


class KilledToy(Toy):
    """Toy whose worker ``SHOAL_TEST_KILL=rank:step`` dies of SIGKILL in the middle of that step."""

    def train(self, session: shoal.train.session.Session) -> None:
        rank, step = map(int, os.environ["SHOAL_TEST_KILL"].split(":"))
        for batch in session.batches():
            if session.group.rank == rank and session.steps_done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            session.backward(session.loss(batch))
            session.step()


def main() -> None:
    storage, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    recipe = KilledToy() if os.environ.get("SHOAL_TEST_KILL") else Toy()
    spec = RunSpec(
        recipe=recipe, name=name, storage=Storage(storage), target_steps=steps, checkpoint_every_s=0.05, threads=1
    )
    with torchrun_group() as group:
        train_worker(spec, group)


if __name__ == "__main__":
    main()
