"""What the training benchmarks train: the digits MLP, and a transformer of 10 million parameters."""

from __future__ import annotations

import os
from typing import Any

import shoal
from benchmarks.steps import completed
from benchmarks.ticks import tick
from jobs.digits import Digits

CONTEXT = 64
VOCABULARY = 256


class Ticking(shoal.Recipe):
    """Ticks at each forward pass of rank 0, so that the benchmark can count steps from outside."""

    ticks: str = ""
    """A file for `benchmarks.ticks`."""

    def loss(self, model: Any, batch: Any) -> Any:
        if os.environ["RANK"] == "0":
            tick(self.ticks)
        return super().loss(model, batch)


class Decoder(shoal.Recipe):
    """A decoder over bytes: 6 layers, width 368, 10M parameters; its data is this library's own source."""

    batch_size: int = 8
    eval_every: int = 1_000_000
    lr: float = 3e-4

    def build_data(self) -> shoal.Datasets:
        from pathlib import Path

        import torch
        from torch.utils.data import TensorDataset

        folder = Path(shoal.__file__).parent
        text = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))[: 4000 * CONTEXT + 1]
        ids = torch.tensor(list(text))
        x, y = ids[:-1].view(-1, CONTEXT), ids[1:].view(-1, CONTEXT)
        return shoal.Datasets(train=TensorDataset(x, y), val=TensorDataset(x[:8], y[:8]))

    def build_model(self) -> Any:
        from torch import nn

        class Layers(nn.Module):
            def __init__(self, width: int = 368, num_layers: int = 6) -> None:
                super().__init__()
                self.embed = nn.Embedding(VOCABULARY, width)
                self.place = nn.Embedding(CONTEXT, width)
                layer = nn.TransformerEncoderLayer(
                    width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
                self.head = nn.Linear(width, VOCABULARY)

            def forward(self, x: Any) -> Any:
                import torch

                mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
                h = self.embed(x) + self.place(torch.arange(x.shape[1]))
                return self.head(self.layers(h, mask=mask, is_causal=True))

        return Layers()

    def loss(self, model: Any, batch: Any) -> Any:
        from torch.nn.functional import cross_entropy

        x, y = batch
        return cross_entropy(model(x).flatten(0, 1), y.flatten())


class BenchDigits(Ticking, Digits):
    """The digits MLP, without looks at the validation data in between."""

    eval_every: int = 1_000_000


SAVE_EVERY_S = 2.0
"""How often those that are killed on purpose save, on every side."""


class CountedDigits(Digits):
    """The digits MLP; every rank notes each step that it completed."""

    eval_every: int = 1_000_000
    folder: str = ""
    """For `benchmarks.steps`."""

    def train(self, session: shoal.Session) -> None:
        for batch in session.batches():
            session.backward(session.loss(batch))
            session.step()
            completed(self.folder, session.group.rank, session.steps_done)


class BenchDecoder(Ticking, Decoder):
    """The transformer."""


CASES: dict[str, tuple[type[Ticking], int, int]] = {
    "digits MLP": (BenchDigits, 1000, 20_000),
    "transformer 10M": (BenchDecoder, 8, 2_000),
}
"""Name -> (recipe, warm-up steps, steps of the run, of which the first minute is measured)."""
