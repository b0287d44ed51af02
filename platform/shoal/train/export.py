"""From a run's best checkpoint to a model: the weights, and where they came from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import NotFoundError
from shoal.models import Lineage, load_tensors, write_package
from shoal.models.lineage import check_reference
from shoal.recipe import from_fields, load_recipe
from shoal.storage import read_json, verify
from shoal.train.checkpoints import MODEL_FILE, STATE_FILE
from shoal.train.revision import code_revision
from shoal.train.run import Run

if TYPE_CHECKING:
    from torch import nn


def write_run_package(run: Run, directory: Path, *, model: str, version: int, project: Path) -> None:
    """Commit the run's best checkpoint as a model version at ``directory``.

    Raises:
        NotFoundError: the run has no checkpoint, or its recipe is not where it was.
        CorruptError: the checkpoint does not verify.
        RecipeError: the recipe lives in a notebook, or no longer takes these weights.
        StorageError: the disk is full or not writable.
    """
    checkpoint = run.best_checkpoint()
    verify(checkpoint)
    net, lineage = _rebuild(run, checkpoint, project)
    write_package(directory, net, model=model, version=version, lineage=lineage)


def _rebuild(run: Run, checkpoint: Path, project: Path) -> tuple[nn.Module, Lineage]:
    identity = _identity(run)
    check_reference(identity["recipe"])
    state = read_json(checkpoint / STATE_FILE)
    lineage = Lineage(
        recipe=identity["recipe"],
        fields=identity["fields"],
        data_fingerprint=_data_fingerprint(run.record.dir),
        code_revision=code_revision(project),
        run=run.name,
        trial=identity.get("trial"),
        checkpoint_step=state["step"],
        metrics=state["values"],
        created=time.time(),
    )
    net = from_fields(load_recipe(identity["recipe"]), identity["fields"]).build_model()
    net.load_state_dict(load_tensors(checkpoint / MODEL_FILE))
    return net, lineage


def _identity(run: Run) -> dict[str, Any]:
    identity = run.record.identity()
    if identity is None:
        raise NotFoundError(f"there is no run {run.name!r}; `shoal runs` lists those that exist")
    return identity


def _data_fingerprint(run_dir: Path) -> str:
    path = run_dir / "data.json"
    return str(read_json(path)["fingerprint"]) if path.exists() else ""
