"""The digits MLP on stock Ray Train and under ``torchrun``, going on after a crash as their documentation shows.

``python -m benchmarks.recovery_peers ray FOLDER`` or ``torchrun ... -m benchmarks.recovery_peers torchrun FOLDER``:
the peers of ``benchmarks.recovery``. Both train until they are killed, note each completed step in the folder, and
save every `SAVE_EVERY_S`. Ray's pages name no more than that (``report`` and ``get_checkpoint``); torch's tutorial
is "Fault-tolerant Distributed Training with torchrun".
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bare_ddp import completed_steps
from benchmarks.recipes import SAVE_EVERY_S
from benchmarks.steps import completed
from jobs.digits import Digits

_LOOK_EVERY = 50
"""Steps between two looks at rank 0's clock: all ranks must report alike, so they have to agree."""
_STATE = "state.pt"

State = dict[str, Any]


def train(folder: str, state: State | None, save: Callable[[State], None]) -> None:
    """Train with DDP's defaults, from ``state`` if there is one; every rank calls ``save`` at the same steps."""
    torch.set_num_threads(1)
    recipe = Digits()
    torch.manual_seed(0)
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    done = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    saved = time.monotonic()
    for step in completed_steps(recipe, model, optimizer, done=done):
        completed(folder, dist.get_rank(), step)
        if step % _LOOK_EVERY == 0 and _rank_0_says(time.monotonic() - saved >= SAVE_EVERY_S):
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
            saved = time.monotonic()


def _rank_0_says(answer: bool) -> bool:
    said = torch.tensor(float(answer))
    dist.broadcast(said, src=0)
    return bool(said)


def train_on_ray(config: dict[str, str]) -> None:
    """One worker of Ray Train."""
    import ray.train

    def save(state: State) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if dist.get_rank() == 0:
                torch.save(state, Path(folder) / _STATE)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": state["step"]}, checkpoint=checkpoint)

    state = None
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / _STATE, weights_only=True)
    train(config["folder"], state, save)


def main_of_ray(folder: Path) -> None:
    """A Ray cluster of this process's own, and a run on it that never gives up."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(folder / "ray"),
    )
    TorchTrainer(
        train_on_ray,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="recovery",
            storage_path=str(folder / "storage"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def main_of_torchrun(folder: Path) -> None:
    """One process of ``torchrun``."""
    dist.init_process_group("gloo")
    snapshot, partial = folder / _STATE, folder / f"{_STATE}.partial"

    def save(state: State) -> None:
        if dist.get_rank() == 0:
            torch.save(state, partial)
            os.replace(partial, snapshot)  # the tutorial writes in place: a kill at that moment ended its run

    train(str(folder), torch.load(snapshot, weights_only=True) if snapshot.exists() else None, save)


if __name__ == "__main__":
    {"ray": main_of_ray, "torchrun": main_of_torchrun}[sys.argv[1]](Path(sys.argv[2]))
