"""Checkpoints of one run: what is in one, and which one to resume from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.errors import CorruptError, RecipeError, StorageError
from shoal.models import load_tensors, save_tensors
from shoal.storage import Succession, Token, commit, newest_verified, read_json
from shoal.storage.background import BackgroundWriter, Span
from shoal.train.staging import Files, Staged, Staging
from shoal.train.stamp import (
    STATE_FILE,
    check_stamp,
    checkpoint_path,
    names_checkpoint,
    position_of,
    stamp,
)
from shoal.train.state import Flat, flatten, snapshot, unflatten, whole

MODEL_FILE = "model.safetensors"
REST_FILE = "rest.safetensors"


BACKGROUND_MIN_BYTES = 8 * 2**20
"""From this size on a state is copied while the next step begins, and written by a process of its own. A smaller one
is copied and written by a thread in less time than that would take."""


@dataclass
class Snapshot:
    """A run's whole state at a step boundary, copied: training may go on while it is written.

    One that is `staged` is copied while the training goes on, and whole only after `complete`.
    """

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
    trained: frozenset[str] = frozenset()
    """Names of the parameters in ``model``."""
    staged: Staged | None = None
    """How it lies in shared memory; None when it has memory of its own."""
    pause_s: float = 0.0
    """How long training stood still for it."""

    def complete(self) -> None:
        """Have the copy finished and looked at. For the thread that writes it.

        Raises:
            RecipeError: a parameter is NaN or infinite.
            StorageError: parameters were changed while they were copied.
        """
        if self.staged is None:
            return
        self.staged.copying.finish()
        if self.staged.copying.is_torn:
            raise StorageError(
                f"step {self.step}: parameters or the optimizer's state changed outside of session.step() while "
                "they were copied; from now on they are copied before the next batch"
            )
        _check_finite(self)

    @property
    def under(self) -> Token:
        """The token, of one that is written."""
        assert self.token is not None
        return self.token

    def directory(self, parent: Path) -> Path:
        """Where it is committed."""
        return checkpoint_path(parent, self.step, self.under.number)

    def stamp(self) -> dict[str, Any]:
        """What its manifest says of it."""
        return stamp(step=self.step, run=self.run, token=self.under.number)

    def state(self) -> bytes:
        """The content of `STATE_FILE`."""
        state = {"step": self.step, "facts": self.facts, "values": self.values, "rest": self.rest.skeleton}
        return json.dumps(state).encode()


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
    staging: Staging | None = None,
    may_overlap: bool = False,
) -> Snapshot:
    """Copy the state to the CPU.

    With ``staging`` a large state goes to its shared memory, and needs `Snapshot.complete`; with ``may_overlap`` what
    the optimizer changes may still be copied when this returns, and has to be before its next step.

    Raises:
        RecipeError: a parameter is NaN or infinite (of a large state: found by `Snapshot.complete`), or the
            optimizer keeps what cannot be saved without pickle.
    """
    files, skeleton = _gather(model, optimizer, scheduler)
    trained = frozenset(name for name, _ in model.named_parameters())
    snap = Snapshot(step, {}, Flat(skeleton), facts, run, token, values, trained)
    if staging is not None and is_large(files):
        # What the optimizer does not train may be changed by a forward pass: buffers, codebooks kept as parameters.
        by_optimizer = {name for name, p in model.named_parameters() if p.requires_grad}
        staged = staging.stage(
            files, later=lambda file, name: may_overlap and (file == REST_FILE or name in by_optimizer)
        )
        snap.staged, snap.model = staged, dict(staged.files[MODEL_FILE])
        snap.rest.tensors = dict(staged.files[REST_FILE])
        return snap
    snap.model = {name: snapshot(t) for name, t in files[MODEL_FILE].items()}
    snap.rest.tensors = {name: snapshot(t) for name, t in files[REST_FILE].items()}
    _check_finite(snap)
    return snap


def tensors_of(model: torch.nn.Module, optimizer: Any, scheduler: Any) -> Files:
    """The tensors of a state as they are, by the file that they belong in.

    Raises:
        RecipeError: the optimizer keeps what cannot be saved without pickle.
    """
    return _gather(model, optimizer, scheduler)[0]


def give_parts(model: torch.nn.Module, optimizer: Any, scheduler: Any) -> None:
    """On a rank that writes nothing, while rank 0 takes a snapshot of a divided model: it needs this rank's parts.

    Each tensor is put together on every rank, and let go of here at once. Blocks as rank 0 does.
    """
    for tensors in tensors_of(model, optimizer, scheduler).values():
        for tensor in tensors.values():
            whole(tensor)


def is_large(files: Files) -> bool:
    """Whether such a state is staged and written in the background."""
    size_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    return size_bytes >= BACKGROUND_MIN_BYTES


def _gather(model: torch.nn.Module, optimizer: Any, scheduler: Any) -> tuple[Files, Any]:
    """Tensors by file, none of them copied, and the JSON that the others leave of optimizer and scheduler."""
    rest = flatten(
        {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
        },
        what="the optimizer or scheduler",
    )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {MODEL_FILE: tensors, REST_FILE: rest.tensors}, rest.skeleton


def _check_finite(snap: Snapshot) -> None:
    for name in snap.trained:  # a buffer may hold -inf: causal masks do
        tensor = snap.model[name]
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise RecipeError(
                f"step {snap.step}: the model's {name} is NaN or infinite, so nothing was saved at this step; "
                "lower the learning rate or clip with session.step(max_grad_norm=...); earlier checkpoints are kept"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    """A sum is finite only if all terms are, and reads them once; one that is not may have overflowed."""
    return bool(tensor.sum().isfinite() or torch.isfinite(tensor).all())


def write_snapshot(parent: Path, snap: Snapshot) -> tuple[Path, int]:
    """Commit the snapshot in ``parent``; returns its folder and its size in bytes. Blocks until it is on the disk.

    Raises:
        SupersededError: somebody else has taken over the run; no reader will use what was written, if anything was.
        StorageError: the disk is full or not writable; nothing is left.
    """
    directory = snap.directory(parent)

    def write(folder: Path) -> None:
        save_tensors(folder / MODEL_FILE, snap.model)
        save_tensors(folder / REST_FILE, snap.rest.tensors)
        (folder / STATE_FILE).write_bytes(snap.state())

    manifest = commit(directory, write, meta=snap.stamp(), guard=snap.under.check)
    return directory, manifest.size_bytes


def write_staged(parent: Path, snap: Snapshot, writer: BackgroundWriter) -> tuple[Path, int]:
    """As `write_snapshot`, by the process of ``writer``, for a snapshot that is staged and complete.

    Raises:
        SupersededError, StorageError: as `write_snapshot`.
        WriterLost: the process died.
    """
    assert snap.staged is not None
    content: dict[str, Span | bytes] = {**snap.staged.spans, STATE_FILE: snap.state()}
    directory = snap.directory(parent)
    return directory, writer.commit(directory, content, meta=snap.stamp(), guard=snap.under.check)


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
