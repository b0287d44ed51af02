"""A rehearsal of a run in this process: builds everything, takes one step, says what the run would need."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from shoal.cli.console import say, show_facts
from shoal.errors import RequestError

if TYPE_CHECKING:
    from shoal.config import ClusterConfig, Range
    from shoal.recipe import Datasets, Recipe
    from shoal.train.options import RunOptions
    from shoal.train.quarantine import BadSample
    from shoal.train.reduce import Wishes
    from shoal.train.session import Session
    from shoal.train.spec import RunSpec


class _OneStep:
    """The boundary of a run that ends after its first step and keeps nothing."""

    def wishes(self) -> Wishes:
        from shoal.train.reduce import Wishes

        return Wishes()

    def bad_sample(self, bad: BadSample) -> None:
        pass  # the session has logged why

    def bad_step(self, step: int, samples: list[int], reason: str) -> None:
        raise AssertionError("on_nan is 'fail' here")

    def before_update(self) -> None:
        pass

    def after_step(self, session: Session, wishes: Wishes) -> bool:
        return True


def dry_run(recipe: Recipe, options: RunOptions) -> None:
    """Take one step here and show what the run would need. Starts and writes nothing; needs no cluster.

    Raises:
        RequestError: the run cannot be as asked, or does not fit what cluster.yaml describes.
        RecipeError: the recipe cannot be trained. What its own code raises comes out as RecipeError too.
    """
    import torch

    from shoal.cli.project import project_here, settings
    from shoal.train.options import plan_run

    config, storage = settings()
    if options.init_from is not None:
        raise RequestError("--dry-run starts from fresh weights: leave --init-from out")
    spec = plan_run(recipe, options, config, storage, project=project_here())
    workers = options.worker_range(config)
    torch.set_num_threads(spec.threads or 1)  # as a worker on a cluster has
    notes = _resource_notes(config, workers)
    session, data, seconds = _one_step(spec)
    try:
        show_facts(_facts(spec, session, data, seconds, workers))
    finally:
        session.close()
    for note in notes:
        say(f"note: {note}")
    say("nothing was started or written")


def _one_step(spec: RunSpec) -> tuple[Session, Datasets, float]:
    """A session after its first step, its data, and how long the step took."""
    import traceback

    from shoal.errors import RecipeError, ShoalError
    from shoal.train.group import Group
    from shoal.train.loader import build_data
    from shoal.train.session import Session

    try:
        session = Session(
            spec.recipe,
            build_data(spec.recipe, spec.seed),
            Group.alone(),
            _OneStep(),
            seed=spec.seed,
            target_steps=spec.target_steps,
            precision=spec.precision,
            shards=spec.shards,
        )
        began = time.monotonic()
        spec.recipe.train(session)
    except ShoalError:
        raise
    except Exception as err:
        raise RecipeError(
            f"{type(spec.recipe).__name__}: {type(err).__name__}: {err}",
            traceback_text=traceback.format_exc(),
        ) from err
    return session, session.data, time.monotonic() - began


def _facts(spec: RunSpec, session: Session, data: Datasets, seconds: float, workers: Range) -> dict[str, str]:
    from shoal.storage.disk import size_text

    num_parameters = sum(p.numel() for p in session.model.parameters())
    loss = (session.take_progress() or {"loss": math.nan})["loss"]
    splits = {"train": data.train, "val": data.val, "test": data.test}
    samples = "  ".join(f"{name} {len(split):,}" for name, split in splits.items() if split is not None)  # type: ignore[arg-type]
    batch = spec.recipe.batch_size
    shares = [f"{count} worker{'s' if count > 1 else ''}: {-(-batch // count)}" for count in _ends(workers)]
    return {
        "run": spec.name,
        "parameters": f"{num_parameters:,}",
        "checkpoint": f"{size_text(_checkpoint_bytes(session))}, {_how_often(spec)}, "
        f"{spec.keep} kept besides the best{f' {spec.keep_best}' if spec.keep_best > 1 else ''}",
        "samples": samples,
        "batch": f"{batch} samples; at most, with " + ", ".join(shares),
        "steps": f"{spec.target_steps:,}, {spec.target_steps * batch / len(data.train):,.1f} epochs",  # type: ignore[arg-type]
        "first step": f"loss {loss:.4g} in {seconds:.2f} s on {session.group.device.type}",
        "folder": str(spec.storage.run_dir(spec.name)),
    }


def _how_often(spec: RunSpec) -> str:
    every_s = spec.checkpoint_every_s
    return "as often as costs 1 % of the time" if every_s is None else f"every {every_s:g} s"


def _ends(workers: Range) -> list[int]:
    return sorted({workers.min, workers.max})


def _checkpoint_bytes(session: Session) -> int:
    """What a one-worker checkpoint holds: model, and optimizer with its state after a step."""
    from shoal.train.checkpoints import take_snapshot

    snap = take_snapshot(
        step=session.steps_done,
        model=session.model,
        optimizer=session.optimizer,
        scheduler=session.scheduler,
        facts={},
        run="",
        values={},
    )
    tensors = [*snap.model.values(), *snap.rest.tensors.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def _resource_notes(config: ClusterConfig, workers: Range) -> list[str]:
    """Whether the workers fit what cluster.yaml describes.

    Raises:
        RequestError: not even the least number of them.
    """
    from shoal.config import Machine
    from shoal.config.local import plan_local

    if config.target != "local":
        return []
    plan = plan_local(config, Machine.here())
    pool = plan.pools.get(config.train.pool or "")
    limit = pool.max_workers if pool is not None else plan.num_cpus
    if workers.min > limit:
        raise RequestError(
            f"workers {workers}: at most {limit} fit on this cluster ({plan.num_cpus} CPUs, {plan.num_gpus} GPUs); "
            "ask for fewer (--workers), or raise targets.local.cpu"
        )
    notes = list(plan.notes)
    if workers.max > limit:
        notes.append(f"of {workers} workers at most {limit} fit")
    return notes
