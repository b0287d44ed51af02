"""Checkpoints of one run: what is in one, and which one to resume from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.errors import CorruptError, RecipeError
from shoal.models import load_tensors, save_tensors
from shoal.storage import Succession, Token, commit, newest_verified, read_json
from shoal.train.stamp import (
    STATE_FILE,
    check_stamp,
    checkpoint_path,
    names_checkpoint,
    position_of,
    stamp,
)
from shoal.train.state import Flat, flatten, snapshot, unflatten

MODEL_FILE = "model.safetensors"
REST_FILE = "rest.safetensors"


@dataclass
class Snapshot:
    """A run's whole state at a step boundary, copied: training may go on while it is written."""

    step: int
    model: dict[str, torch.Tensor]
    rest: Flat
    """Optimizer and scheduler."""
    facts: dict[str, Any]
    """What the checkpoint was made with: workers, device, threads, precision, versions."""
    run: str
    """Digest of the run's identity, see `spec.digest_of`."""
    token: Token | None = None
    """Under which it is written; None for one that never is."""
    values: dict[str, float] = field(default_factory=dict)
    """The validation metrics measured at this very step, if any were."""


def take_snapshot(
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    facts: dict[str, Any],
    run: str,
    values: dict[str, float],
    token: Token | None = None,
) -> Snapshot:
    """Copy the state to the CPU.

    Raises:
        RecipeError: a parameter is NaN or infinite, or the optimizer keeps what cannot be saved without pickle.
    """
    tensors = {name: snapshot(t) for name, t in model.state_dict().items()}
    trained = {name for name, _ in model.named_parameters()}  # a buffer may hold -inf: causal masks do
    for name, t in tensors.items():
        if name in trained and t.is_floating_point() and not torch.isfinite(t).all():
            raise RecipeError(
                f"step {step}: the model's {name} is NaN or infinite, so nothing was saved at this step; "
                "lower the learning rate or clip with session.step(max_grad_norm=...); earlier checkpoints are kept"
            )
    rest = flatten(
        {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
        },
        what="the optimizer or scheduler",
    )
    return Snapshot(step, tensors, rest, facts, run, token, values)


def write_snapshot(parent: Path, snap: Snapshot) -> tuple[Path, int]:
    """Commit the snapshot in ``parent``; returns its folder and its size in bytes. Blocks until it is on the disk.

    Raises:
        SupersededError: somebody else has taken over the run; no reader will use what was written, if anything was.
        StorageError: the disk is full or not writable; nothing is left.
    """
    assert snap.token is not None
    directory = checkpoint_path(parent, snap.step, snap.token.number)

    def write(folder: Path) -> None:
        save_tensors(folder / MODEL_FILE, snap.model)
        save_tensors(folder / REST_FILE, snap.rest.tensors)
        state = {"step": snap.step, "facts": snap.facts, "values": snap.values, "rest": snap.rest.skeleton}
        (folder / STATE_FILE).write_text(json.dumps(state))

    meta = stamp(step=snap.step, run=snap.run, token=snap.token.number)
    manifest = commit(directory, write, meta=meta, guard=snap.token.check)
    return directory, manifest.size_bytes


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read back."""

    path: Path
    step: int
    model: dict[str, torch.Tensor]
    optimizer: Any
    scheduler: Any
    facts: dict[str, Any]


def read_checkpoint(directory: Path) -> Loaded:
    """Read a checkpoint that has been verified. Runs no code from it.

    Raises:
        CorruptError: its files do not fit together.
    """
    try:
        state = read_json(directory / STATE_FILE)
        rest = unflatten(state["rest"], dict(load_tensors(directory / REST_FILE)))
        model = dict(load_tensors(directory / MODEL_FILE))
        return Loaded(
            directory,
            state["step"],
            model,
            rest["optimizer"],
            rest["scheduler"],
            state["facts"],
        )
    except (KeyError, TypeError, OSError) as err:
        raise CorruptError(f"{directory} is not a checkpoint of shoal: {err!r}") from err


def measured_at(directory: Path) -> dict[str, float]:
    """The validation metrics that were measured at a checkpoint's step, if any were.

    Raises:
        CorruptError, NotFoundError: it has no readable ``state.json``.
    """
    values: dict[str, float] = read_json(directory / STATE_FILE).get("values", {})
    return values


def find_checkpoint(
    parent: Path,
    identity: Mapping[str, Any] | None,
    succession: Succession,
    on_rejected: Callable[[Path, str], None],
) -> Path | None:
    """The newest checkpoint of the run ``identity`` that counts and verifies, or None.

    Each newer one that does not verify, or is not this run's, is reported and left alone.
    """
    if not parent.is_dir():
        return None
    found = newest_verified(
        parent,
        named=lambda name: names_checkpoint(name) and succession.counts(*position_of(Path(name))),
        check=lambda directory, manifest: check_stamp(directory, manifest, identity),
        on_rejected=on_rejected,
    )
    return found[0] if found else None
