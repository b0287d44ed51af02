"""One GPU: tokens per second of a run beside plain PyTorch, MFU, and what a checkpoint from device memory costs.

    python -m benchmarks.gpu [--rounds 7] [--peak-tflops 989]

Needs torch and shoal, not Ray. A GPT of 124M parameters (12 layers, width 768, context 1024) in bf16 autocast with
fused AdamW, the same on both sides. The run is the engine's own, with its record; both take turns of some steps in
one process, and the first round, which compiles kernels, is not counted. Other sizes and ``--device cpu`` are for
trying the script.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import shoal
from benchmarks import checkpoint
from benchmarks.ratios import paired_ratio
from shoal.storage import Storage
from shoal.tracking import RunRecord, RunState
from shoal.train.engine import train_worker
from shoal.train.group import Group
from shoal.train.spec import RunSpec

GOAL = 0.99
"""Lower bound of tokens/s of a run / plain PyTorch."""
STEPS = 20
"""Of a turn."""
TURN_TIMEOUT_S = 300.0
PEAK_TFLOPS = 989.0
"""Of an NVIDIA H100 or H200 SXM, bf16, dense (half of the data sheet's figure with sparsity)."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    vocabulary: int = 50_304
    """GPT-2's 50,257, rounded up to a multiple of 64 as is usual on tensor cores."""
    batch: int = 16

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.context

    def flops_per_token(self, num_params: int) -> float:
        """Forward and backward: ``6 N + 12 L H Q T`` (Chowdhery et al., "PaLM", 2022, appendix B).

        N without the embedding of places; ``H Q`` is the width.
        """
        return 6 * (num_params - self.context * self.width) + 12 * self.layers * self.width * self.context


class Gpt(nn.Module):
    """A decoder with the embedding tied to the head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.place = nn.Embedding(shape.context, shape.width)
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 4 * shape.width, dropout=0.0, batch_first=True, norm_first=True,
            activation="gelu",
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(shape.width)
        mask = nn.Transformer.generate_square_subsequent_mask(shape.context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids) + self.place.weight
        hidden = self.norm(self.layers(hidden, mask=self.mask, is_causal=True))
        return nn.functional.linear(hidden, self.embed.weight)


class Noise(Dataset[torch.Tensor]):
    """Random tokens, a function of the index."""

    def __init__(self, shape: Shape, length: int) -> None:
        self._shape, self._length = shape, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(index)
        return torch.randint(self._shape.vocabulary, (self._shape.context + 1,), generator=draw)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token."""
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The same on both sides."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


class Turns:
    """Lets a thread take a turn, and waits for its end."""

    def __init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def wait_for_mine(self) -> None:
        """The thread's side, between two turns."""
        self._done.release()
        if not self._go.acquire(timeout=TURN_TIMEOUT_S):
            raise TimeoutError(f"no turn came within {TURN_TIMEOUT_S:g} s")

    def give(self) -> None:
        """Let the thread take its turn."""
        self._go.release()

    def wait_until_over(self) -> None:
        """Block until the thread waits."""
        if not self._done.acquire(timeout=TURN_TIMEOUT_S):
            raise SystemExit(f"a turn of the run took more than {TURN_TIMEOUT_S:g} s")


class TakingTurns(shoal.Recipe):
    """The run's side: `STEPS` steps at each turn."""

    eval_every: int = 1_000_000
    shape: ClassVar[Shape] = Shape()
    turns: ClassVar[Turns] = Turns()

    def build_data(self) -> shoal.Datasets:
        shape = self.shape
        return shoal.Datasets(train=Noise(shape, 64 * shape.batch), val=Noise(shape, shape.batch))

    def build_model(self) -> nn.Module:
        return Gpt(self.shape)

    def build_optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        return adamw(model)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_of(model, batch)

    def train(self, session: shoal.Session) -> None:
        for batch in session.batches():
            if session.steps_done % STEPS == 0:
                synchronize(session.group.device)
                self.turns.wait_for_mine()
            session.backward(session.loss(batch))
            session.step()
        synchronize(session.group.device)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_turns(shape: Shape, device: torch.device) -> Iterator[None]:
    """The peer: the loop that PyTorch's documentation shows; each ``next`` takes `STEPS` steps."""
    torch.manual_seed(0)
    model = Gpt(shape).to(device)
    optimizer = adamw(model)
    loader = DataLoader(
        Noise(shape, 64 * shape.batch), batch_size=shape.batch, shuffle=True, drop_last=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    batches = iter(loader)
    while True:
        for _ in range(STEPS):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            batch = batch.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        synchronize(device)
        yield


def measure_tokens(shape: Shape, rounds: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of `STEPS` steps of the run and of the peer, round by round."""
    TakingTurns.shape, TakingTurns.turns = shape, Turns()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        spec = RunSpec(
            recipe=TakingTurns(batch_size=shape.batch),
            name="gpu",
            storage=Storage(Path(folder)),
            target_steps=(rounds + 2)
            * STEPS,  # one turn to warm up; the last ends with a checkpoint, and is not timed
            precision="bf16",
            checkpoint_every_s=1e6,
        )
        turns = TakingTurns.turns
        run = threading.Thread(target=train_worker, args=(spec, Group.alone(device)), daemon=True)
        run.start()
        turns.wait_until_over()
        plain = plain_turns(shape, device)
        ours, theirs = [], []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            turns.give()
            turns.wait_until_over()
            between = time.perf_counter()
            next(plain)
            ours.append(between - began)
            theirs.append(time.perf_counter() - between)
        turns.give()
        run.join(TURN_TIMEOUT_S)
        record = RunRecord(spec.storage, "gpu")
        if record.state() is not RunState.FINISHED:
            raise SystemExit(f"the run did not finish: {record.events(('end',))}")
    return ours[1:], theirs[1:]


class GptTraining(checkpoint.Training):
    """The loop whose checkpoints are measured."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = Gpt(shape).to(device)
        self.optimizer = adamw(self.model)
        self._batch = torch.stack([Noise(shape, shape.batch)[i] for i in range(shape.batch)]).to(device)
        self._device = device
        self.before_update = lambda: None

    def step(self) -> float:
        began = time.perf_counter()
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            loss = loss_of(self.model, self._batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.before_update()
        self.optimizer.step()
        synchronize(self._device)
        return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return 1 if a goal is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="default 7; an interval needs 2")
    parser.add_argument(
        "--peak-tflops", type=float, default=PEAK_TFLOPS, help="default: H100, H200, bf16 dense"
    )
    parser.add_argument("--device", default="cuda")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args(arguments)
    if asked.rounds < 2:
        parser.error(f"--rounds {asked.rounds}: an interval needs 2 or more")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none; --device cpu with small sizes tries the script")
    shape = Shape(**{name: getattr(asked, name) for name in vars(Shape())})
    device = torch.device(asked.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    num_params = sum(p.numel() for p in Gpt(shape).parameters())
    print(
        f"{name}, torch {torch.__version__}, {num_params / 1e6:.1f}M parameters, {shape.tokens} tokens a step"
    )
    is_fast = report_tokens(
        shape, num_params, *measure_tokens(shape, asked.rounds, device), asked.peak_tflops
    )
    is_free = checkpoint.run(GptTraining(shape, device), asked.rounds)
    return 0 if is_fast and is_free else 1


def report_tokens(
    shape: Shape, num_params: int, ours: list[float], theirs: list[float], peak_tflops: float
) -> bool:
    """Print tokens/s, their ratio and MFU; whether the goal is met."""
    flops = shape.flops_per_token(num_params)
    print(
        f"FLOPs per token = 6 (N - T W) + 12 L W T = {flops / 1e9:.3f} G; MFU = tokens/s x that / {peak_tflops:g} T"
    )
    for side, seconds in (("shoal", ours), ("plain PyTorch", theirs)):
        rate = len(seconds) * STEPS * shape.tokens / sum(seconds)
        print(f"  {side:14} {rate:12,.0f} tokens/s   MFU {rate * flops / (peak_tflops * 1e12):.3f}")
    ratio = paired_ratio(theirs, ours)
    is_met = ratio.low >= GOAL
    print(f"tokens/s, shoal / plain: {ratio}; goal, lower bound {GOAL}: {'met' if is_met else 'NOT MET'}")
    return is_met


if __name__ == "__main__":
    sys.exit(main())
