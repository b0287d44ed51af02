"""Where a run goes on from: the state is found and loaded, and what changed since is said or refused."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shoal.errors import IdentityError, RecipeError
from shoal.models import ModelPackage, load_tensors
from shoal.models.package import WEIGHTS
from shoal.recipe import Datasets, recipe_ref
from shoal.storage import Token, create_json, read_json
from shoal.tracking import RunRecord
from shoal.train.bad_steps import BadStep, read_bad_steps
from shoal.train.checkpoints import Loaded, find_checkpoint, measured_at, read_checkpoint
from shoal.train.fingerprint import fingerprint
from shoal.train.group import Group
from shoal.train.inherit import under_new_fields
from shoal.train.quarantine import read_quarantine
from shoal.train.session import Session
from shoal.train.spec import RunSpec
from shoal.train.stamp import checkpoint_folders, position_of, step_of


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What an attempt begins with."""

    source: Literal["fresh", "checkpoint", "init_from", "adopted"]
    """Where the weights came from."""
    saved_step: int | None = None
    """The step of the checkpoint that was loaded; None when there was none."""
    unmeasured: Path | None = None
    """That checkpoint, if it knows of no validation values at its step, or the record does not."""
    best: dict[int, float]
    """Step and objective of the best checkpoints that are there, at most as many as are kept for that."""
    bad_steps: list[BadStep]
    """Steps that are left out."""


def restore(session: Session, spec: RunSpec, record: RunRecord, token: Token) -> Beginning:
    """Go on from the run's newest checkpoint that verifies, on every rank; without one, from what ``spec`` names.

    Rank 0 writes it down with the ``token``: whatever somebody else commits beyond that does not count.

    Raises:
        SupersededError: somebody else has taken over the run.
        RecipeError: what is there does not fit the recipe, or the checkpoint it was to adopt is gone.
        CorruptError: the weights to start from do not verify.
    """
    group = session.group
    path: Path | None = None
    is_measured = False
    best: dict[int, float] = {}
    bad_steps: list[BadStep] = []
    quarantine: dict[int, int] = {}
    if group.is_first:

        def rejected(path: Path, reason: str) -> None:
            record.append("rejected", path=str(path.relative_to(record.dir)), reason=reason)

        succession = record.fence.succession()
        path = find_checkpoint(record.checkpoints_dir, record.identity(), succession, rejected)
        there = map(position_of, checkpoint_folders(record.checkpoints_dir))
        token.begin(succession.up_to(position_of(path) if path is not None else None, there))
        if path is not None and not (spec.source is not None and spec.source.step == step_of(path)):
            _record_if_missing(record, path)
            is_measured = _is_measured(record, path)
        best = _best_recorded(spec, record)
        bad_steps = read_bad_steps(record.dir)
        quarantine = read_quarantine(record.dir)
    shared = group.share((path, is_measured, best, bad_steps, quarantine))
    path, is_measured, best, bad_steps, quarantine = shared
    session.quarantine.know(quarantine)
    session.left_out = frozenset(bad.step for bad in bad_steps)
    if path is not None:
        loaded = read_checkpoint(path)
        # Its own checkpoints come later; until there is one, every attempt begins from the source's.
        is_adopted = spec.source is not None and spec.source.step == loaded.step
        _load(session, under_new_fields(loaded, session, spec) if is_adopted else loaded, spec, record)
        return Beginning(
            source="adopted" if is_adopted else "checkpoint",
            saved_step=loaded.step,
            unmeasured=None if is_adopted or is_measured else path,
            best=best,
            bad_steps=bad_steps,
        )
    if spec.source is not None:
        raise RecipeError(
            f"the copy of step {spec.source.step} of run {spec.source.run!r}, from which this run "
            f"was to go on, is gone from {record.checkpoints_dir} or damaged; start another run"
        )
    if spec.init_from is not None:
        _load_weights(session, spec.init_from, expect=spec.init_from_name)
        return Beginning(source="init_from", best=best, bad_steps=bad_steps)
    return Beginning(source="fresh", best=best, bad_steps=bad_steps)


def check_data(record: RunRecord, data: Datasets, group: Group) -> None:
    """Refuse data that differs between workers, or from what the run was trained on before.

    Raises:
        RecipeError: workers have different data.
        IdentityError: the run was trained on other data.
    """
    prints = group.gather(fingerprint(data))
    if len(set(prints)) > 1:
        raise RecipeError(
            f"build_data gave different data on different workers (fingerprints {', '.join(prints)}); "
            "it must give the same on every call: fix its seeds"
        )
    if not group.is_first:
        return
    found = {"fingerprint": prints[0]}
    path = record.dir / "data.json"
    if not create_json(path, found) and (was := read_json(path)) != found:
        raise IdentityError(
            f"run {record.name!r} was trained on other data (fingerprint {was['fingerprint']}, now "
            f"{found['fingerprint']}); restore that data, or start another run with name=..."
        )


def warn_of_changed_code(record: RunRecord, spec: RunSpec) -> None:
    """Say in the record that the project's code is not what the last attempt ran, where both are known."""
    last = record.events(("start",))[-1:]
    was = last[0].get("revision", "") if last else ""
    if was and spec.revision and was != spec.revision:
        record.append(
            "warning", message=f"the code changed since the last attempt: {was}, now {spec.revision}"
        )


def facts(spec: RunSpec, group: Group) -> dict[str, Any]:
    """What the last bits of a run depend on besides its identity; kept in every checkpoint."""
    return {
        "recipe": recipe_ref(spec.recipe),
        "workers": group.size if spec.shards is None else "any",
        "device": group.device.type,
        "threads": torch.get_num_threads(),
        "precision": spec.precision,
        "strategy": spec.strategy,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _best_recorded(spec: RunSpec, record: RunRecord) -> dict[int, float]:
    objective = spec.recipe.objective
    values = {
        int(event["step"]): float(event["values"][objective.metric])
        for event in record.checkpoints()
        if objective.metric in event.get("values", {})
    }
    return objective.best(values, spec.keep_best)


def _is_measured(record: RunRecord, checkpoint: Path) -> bool:
    """Whether both the checkpoint and the record know what was measured at its step."""
    step = step_of(checkpoint)
    recorded = (event for event in record.iter_events(("eval",)) if event["split"] == "val")
    return bool(measured_at(checkpoint)) and any(event["step"] == step for event in recorded)


def _record_if_missing(record: RunRecord, checkpoint: Path) -> None:
    """The line of a checkpoint that was committed by a process that died before it could write it."""
    path = str(checkpoint.relative_to(record.dir))
    if all(event["path"] != path for event in record.checkpoints()):
        record_checkpoint(record, checkpoint, measured_at(checkpoint))


def record_checkpoint(record: RunRecord, checkpoint: Path, values: Mapping[str, float]) -> None:
    """Write the line of a checkpoint that is there already; ``values`` were measured at its step."""
    record.append(
        "checkpoint",
        step=step_of(checkpoint),
        path=str(checkpoint.relative_to(record.dir)),
        size_bytes=sum(file.stat().st_size for file in checkpoint.iterdir()),
        seconds=0.0,
        values=dict(values),
    )


def _load(session: Session, loaded: Loaded, spec: RunSpec, record: RunRecord) -> None:
    group = session.group
    try:
        session.load_state(loaded.model, loaded.optimizer)
        if session.scheduler is not None and loaded.scheduler is not None:
            session.scheduler.load_state_dict(loaded.scheduler)
    except (RuntimeError, ValueError, KeyError) as err:
        raise RecipeError(
            f"the checkpoint of step {loaded.step} does not fit the recipe as it is now: {err}. "
            + (
                f"It is of run {spec.source.run!r}, whose fields are others: population-based training "
                "can search only fields that leave the model's shape alone; fix those that do not"
                if spec.source is not None
                else "The model's code changed; undo that, or start another run with a name of its own"
            )
        ) from err
    session.steps_done = loaded.step
    if group.is_first:
        here = facts(spec, group)
        for name, was in loaded.facts.items():
            if here[name] != was:
                record.append(
                    "warning",
                    message=f"{name} was {was} in the checkpoint and is {here[name]} now; the last bits may differ",
                )


def _load_weights(session: Session, package: Path, *, expect: str | None) -> None:
    ModelPackage.open(package, expect=expect)
    try:
        session.load_state(load_tensors(package / WEIGHTS))
    except RuntimeError as err:
        raise RecipeError(
            f"init_from: the weights in {package} do not fit this recipe's model: {err}"
        ) from err
