"""Which of two crescents does a point belong to? A recipe and a main.

shoal train jobs.my_task lr=3e-3 --workers 2
ray job submit --working-dir . -- python -m jobs.my_task train lr=3e-3 --workers 2
"""

from __future__ import annotations

from typing import Any

import shoal


class MyTask(shoal.Recipe):
    """Points in the plane, of two classes: crescents that reach into each other, made up on the spot.

    Its fields are the hyperparameters: ``shoal train jobs.my_task hidden=64`` sets one.
    """

    objective = shoal.maximize("accuracy")
    steps = 400

    hidden: int = 32
    lr: float = 1e-2
    batch_size: int = 64

    def build_data(self) -> shoal.Datasets:
        """Put your own data here: any torch dataset with ``len(d)`` and ``d[i]``, which need not be shuffled.

        Called once in every worker, and has to give the same data each time, so split and generate with fixed
        seeds. Name files as ``Path(__file__).parent / "points.csv"``: workers need not run in this folder.
        """
        import torch
        from torch.utils.data import TensorDataset

        random = torch.Generator().manual_seed(0)
        num_points = 2000
        labels = torch.arange(num_points) % 2
        angle = torch.pi * torch.rand(num_points, generator=random)
        upper = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
        points = torch.where(labels[:, None] == 0, upper, lower)
        points += 0.15 * torch.randn(points.shape, generator=random)
        train, val, test = slice(0, 1400), slice(1400, 1700), slice(1700, None)
        return shoal.Datasets(
            train=TensorDataset(points[train], labels[train]),
            val=TensorDataset(points[val], labels[val]),  # chooses the best checkpoint
            test=TensorDataset(points[test], labels[test]),  # measured once, at the end
        )

    def build_model(self) -> Any:
        """Put your own model here: any torch module."""
        from torch import nn

        return nn.Sequential(
            nn.Linear(2, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, 2),
        )

    def loss(self, model: Any, batch: Any) -> Any:
        from torch.nn.functional import cross_entropy

        points, labels = batch
        return cross_entropy(model(points), labels)

    def metrics(self, model: Any, batch: Any) -> dict[str, Any]:
        points, labels = batch
        return {"accuracy": (model(points).argmax(dim=1) == labels).float().mean()}


if __name__ == "__main__":
    shoal.main(MyTask)
