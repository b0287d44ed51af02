"""From a run's best checkpoint to a model: the weights, and where they came from."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path

from shoal.errors import CorruptError, NotFoundError
from shoal.models import Lineage, load_tensors, write_package
from shoal.storage import read_json, reading, verify
from shoal.train.checkpoints import MODEL_FILE
from shoal.train.run import Run
from shoal.train.stamp import STATE_FILE, check_stamp

_ATTEMPTS = 3
"""At holding the best checkpoint of a run that trains."""


def write_run_package(run: Run, directory: Path, *, model: str, version: int) -> None:
    """Commit the run's best checkpoint as a model version at ``directory``.

    Raises:
        NotFoundError: the run has no checkpoint, or its recipe is not where it was.
        CorruptError: the checkpoint does not verify, or is of another run.
        RecipeError: the recipe lives in a notebook, or no longer takes these weights.
        StorageError: the disk is full or not writable.
    """
    with ExitStack() as held:
        checkpoint = _hold_best(run, held)
        check_stamp(checkpoint, verify(checkpoint), run.record.identity())
        lineage = lineage_of(run, checkpoint)
        weights = load_tensors(checkpoint / MODEL_FILE)
        write_package(directory, weights, model=model, version=version, lineage=lineage)


def _hold_best(run: Run, held: ExitStack) -> Path:
    """The run's best checkpoint, which is not deleted while it is ``held``.

    A run that trains on may have deleted what was the best a moment ago; then there is a better one.
    """
    for _ in range(_ATTEMPTS - 1):
        checkpoint = run.best_checkpoint()
        with suppress(CorruptError):
            held.enter_context(reading(checkpoint))
            return checkpoint
    checkpoint = run.best_checkpoint()
    held.enter_context(reading(checkpoint))
    return checkpoint


def lineage_of(run: Run, checkpoint: Path) -> Lineage:
    """Where the weights of one of the run's checkpoints come from."""
    identity = run.record.identity()
    if identity is None:
        raise NotFoundError(f"there is no run {run.name!r}; `shoal runs` lists those that exist")
    state = read_json(checkpoint / STATE_FILE)
    starts = run.record.events(("start",))
    return Lineage(
        recipe=identity["recipe"],
        fields=identity["fields"],
        data_fingerprint=_data_fingerprint(run),
        code_revision=starts[-1].get("revision", "") if starts else "",
        run=run.name,
        trial=_trial_of(run),
        checkpoint_step=state["step"],
        metrics=state["values"],
        created=time.time(),
        source=identity.get("source"),
    )


def _trial_of(run: Run) -> str | None:
    """``<sweep>/<number>`` of a run that was a trial."""
    trial = run.record.trial()
    return f"{trial[0]}/{trial[1]}" if trial else None


def _data_fingerprint(run: Run) -> str:
    """Empty for a run that has not seen its data."""
    path = run.record.dir / "data.json"
    return str(read_json(path).get("fingerprint", "")) if path.exists() else ""
