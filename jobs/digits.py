"""Handwritten digits: a recipe and a main.

shoal train jobs.digits lr=1e-3 --workers 2
ray job submit --working-dir . -- python -m jobs.digits train lr=1e-3 --workers 2
"""

from __future__ import annotations

from typing import Any

import shoal


class Digits(shoal.Recipe):
    """Handwritten digits (UCI ML hand-written digits, as scikit-learn ships them): 8 x 8 grey pixels, 10 classes."""

    objective = shoal.maximize("accuracy")
    steps = 600

    hidden: int = 128
    dropout: float = 0.1
    lr: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 64

    def build_data(self) -> shoal.Datasets:
        import torch
        from sklearn.datasets import load_digits
        from torch.utils.data import TensorDataset

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16.0
        labels = torch.tensor(digits.target)
        # A fixed shuffle: the file is grouped by writer, and test images must come from nobody in particular.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2026))
        train, val, test = order[:1197], order[1197:1497], order[1497:]
        return shoal.Datasets(
            train=TensorDataset(images[train], labels[train]),
            val=TensorDataset(images[val], labels[val]),
            test=TensorDataset(images[test], labels[test]),
        )

    def build_model(self) -> Any:
        from torch import nn

        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, self.hidden),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(self.hidden, self.hidden),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(self.hidden, 10),
        )

    def build_optimizer(self, model: Any) -> Any:
        from torch.optim import AdamW

        return AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def loss(self, model: Any, batch: Any) -> Any:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        return cross_entropy(model(images), labels)

    def metrics(self, model: Any, batch: Any) -> dict[str, Any]:
        images, labels = batch
        return {"accuracy": (model(images).argmax(dim=1) == labels).float().mean()}


if __name__ == "__main__":
    shoal.main(Digits)
