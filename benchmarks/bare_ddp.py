"""The same recipe under bare ``torchrun`` and DistributedDataParallel: the peer of ``benchmarks.train``.

``torchrun --nproc-per-node 2 -m benchmarks.bare_ddp CASE SAVE_EVERY_S TICKS``; goes on until it is killed.
Defaults of DDP, one torch thread, the loader that torch's own examples use (DistributedSampler).
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import shoal
from benchmarks.recipes import CASES


def main() -> None:
    """Train; the recipe ticks into the file that is named last."""
    recipe_class, _, _ = CASES[sys.argv[1]]
    save_every_s, ticks = float(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo")
    recipe = recipe_class(ticks=str(ticks))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    saved = time.monotonic()
    for _ in completed_steps(recipe, model, optimizer):
        if save_every_s and time.monotonic() - saved >= save_every_s:
            _save(model, optimizer, ticks.parent)
            saved = time.monotonic()


def completed_steps(
    recipe: shoal.Recipe, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, done: int = 0
) -> Iterator[int]:
    """Train with DDP's defaults for ever; the number of each step once it is completed, ``done`` being the last."""
    data = recipe.build_data()
    ddp = DistributedDataParallel(model)
    sampler: DistributedSampler[object] = DistributedSampler(data.train)
    loader = DataLoader(data.train, batch_size=recipe.batch_size // dist.get_world_size(), sampler=sampler)
    for epoch in itertools.count(done // len(loader)):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = recipe.loss(ddp, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # every training script logs it; shoal does too
            done += 1
            yield done


def _save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    if dist.get_rank() == 0:
        with tempfile.TemporaryFile(dir=folder) as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()
