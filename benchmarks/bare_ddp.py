"""The same recipe under bare ``torchrun`` and DistributedDataParallel: the peer of ``benchmarks.train``.

``torchrun --nproc-per-node 2 -m benchmarks.bare_ddp CASE SAVE_EVERY_S TICKS``; goes on until it is killed.
Defaults of DDP, one torch thread, the loader that torch's own examples use (DistributedSampler).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.recipes import CASES


def main() -> None:
    """Train; the recipe ticks into the file that is named last."""
    recipe_class, _, _ = CASES[sys.argv[1]]
    save_every_s, ticks = float(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    recipe = recipe_class(ticks=str(ticks))
    torch.manual_seed(0)
    data = recipe.build_data()
    model = recipe.build_model()
    ddp = DistributedDataParallel(model)
    optimizer = recipe.build_optimizer(model)
    sampler: DistributedSampler[object] = DistributedSampler(data.train)
    loader = DataLoader(data.train, batch_size=recipe.batch_size // dist.get_world_size(), sampler=sampler)
    epoch, saved = 0, time.monotonic()
    while True:
        sampler.set_epoch(epoch)
        epoch += 1
        for batch in loader:
            loss = recipe.loss(ddp, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # every training script logs it; ours does too
            if save_every_s and time.monotonic() - saved >= save_every_s:
                _save(model, optimizer, ticks.parent)
                saved = time.monotonic()


def _save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    if dist.get_rank() == 0:
        with tempfile.TemporaryFile(dir=folder) as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()
