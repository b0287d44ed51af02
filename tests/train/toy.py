"""A recipe with everything that a resume can get wrong: dropout, BatchNorm, momentum, a schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import shoal


class Toy(shoal.Recipe):
    """Two classes in eight dimensions; trains in milliseconds."""

    objective = shoal.maximize("accuracy")
    steps = 60

    batch_size: int = 12
    eval_every: int = 20
    lr: float = 0.05

    def build_data(self) -> shoal.Datasets:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(100, 8, generator=generator)
        y = (x[:, 0] + x[:, 1] > 0).long()
        return shoal.Datasets(train=TensorDataset(x[:70], y[:70]), val=TensorDataset(x[70:], y[70:]))

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 33),
            nn.BatchNorm1d(33),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(33, 65),
            nn.Tanh(),
            nn.Linear(65, 2),
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        return {"accuracy": (model(x).argmax(1) == y).float().mean()}
