"""Checkpoints of one run: what is in one, when it is written, which are kept, which one to resume from."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.errors import CorruptError, RecipeError, ShoalError, StorageError
from shoal.models import load_tensors, save_tensors
from shoal.recipe import Objective
from shoal.storage import (
    collect_orphans,
    commit,
    discard,
    make_directories,
    newest_verified,
    read_json,
)
from shoal.train.stamp import (
    STATE_FILE,
    check_stamp,
    checkpoint_path,
    names_checkpoint,
    stamp,
    step_of,
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
    return Snapshot(step, tensors, rest, facts, run, values)


def write_snapshot(directory: Path, snap: Snapshot) -> int:
    """Commit the snapshot as ``directory``; returns its size in bytes. Blocks until it is on the disk.

    Raises:
        StorageError: the disk is full or not writable; nothing is left at ``directory``.
    """

    def write(folder: Path) -> None:
        save_tensors(folder / MODEL_FILE, snap.model)
        save_tensors(folder / REST_FILE, snap.rest.tensors)
        state = {"step": snap.step, "facts": snap.facts, "values": snap.values, "rest": snap.rest.skeleton}
        (folder / STATE_FILE).write_text(json.dumps(state))

    manifest = commit(directory, write, meta=stamp(step=snap.step, run=snap.run))
    return manifest.size_bytes


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
    parent: Path, identity: Mapping[str, Any] | None, on_rejected: Callable[[Path, str], None]
) -> Path | None:
    """The newest checkpoint of the run ``identity`` that verifies, or None.

    Each newer one that does not, or is not this run's, is reported and left alone.
    """
    if not parent.is_dir():
        return None
    found = newest_verified(
        parent,
        named=names_checkpoint,
        check=lambda directory, manifest: check_stamp(directory, manifest, identity),
        on_rejected=on_rejected,
    )
    return found[0] if found else None


def plan_discard(steps: Iterable[int], *, keep: int, best: int | None) -> list[int]:
    """Which checkpoints to delete: all but the newest ``keep`` and the best one."""
    ordered = sorted(steps, reverse=True)
    return [step for step in ordered[keep:] if step != best]


class CheckpointWriter:
    """Writes snapshots of one run on a thread of its own, one at a time, and deletes what is not kept.

    A second `submit` waits for the first: snapshots never pile up. Call `close` to wait for the last one.
    """

    def __init__(
        self,
        parent: Path,
        *,
        keep: int,
        objective: Objective,
        on_commit: Callable[[Snapshot, Path, int, float], None],
        on_failure: Callable[[Snapshot, ShoalError], None],
    ) -> None:
        self._parent = parent
        self._keep = keep
        self._objective = objective
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None
        self._failure: ShoalError | None = None
        self._best: tuple[int, float] | None = None
        make_directories(parent)
        collect_orphans(parent)

    @property
    def best_value(self) -> float | None:
        """The objective at the best committed checkpoint, or None."""
        return self._best[1] if self._best else None

    def know_best(self, step: int, value: float) -> None:
        """Tell of a best checkpoint that an earlier attempt committed."""
        self._best = (step, value)

    def submit(self, snap: Snapshot) -> None:
        """Begin to write ``snap``; waits first for the one before it."""
        self.join()
        self._thread = threading.Thread(
            target=self._write, args=(snap,), name="shoal-checkpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait until the last snapshot is committed.

        Raises:
            StorageError: that one could not be written.
        """
        self.join()
        if self._failure is not None:
            raise self._failure

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is being written, for at most ``timeout_s``; True then. Errors are left to `close`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.is_writing

    def _write(self, snap: Snapshot) -> None:
        started = time.monotonic()
        path = checkpoint_path(self._parent, snap.step)
        try:
            if path.exists():  # one that did not verify, or the same step written by an attempt that died
                discard(path)
            size_bytes = write_snapshot(path, snap)
            value = snap.values.get(self._objective.metric)
            if value is not None and self._objective.is_better(value, self.best_value):
                self._best = (snap.step, value)
            self._on_commit(snap, path, size_bytes, time.monotonic() - started)
            self._failure = None
            self._discard_old(snap.step)
        except ShoalError as err:
            self._failure = err
            self._on_failure(snap, err)
        except Exception as err:  # a thread's exception would vanish: keep it for `close`
            self._failure = StorageError(f"writing {path} failed: {type(err).__name__}: {err}")
            self._on_failure(snap, self._failure)

    def _discard_old(self, newest: int) -> None:
        # Steps beyond the one just committed did not verify, or the run would have gone on from them: they
        # must not push out what does verify.
        there = [path for path in self._parent.iterdir() if path.is_dir() and names_checkpoint(path.name)]
        steps = [step for path in there if (step := step_of(path)) <= newest]
        for step in plan_discard(steps, keep=self._keep, best=self._best[0] if self._best else None):
            discard(checkpoint_path(self._parent, step))
