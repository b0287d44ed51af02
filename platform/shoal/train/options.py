"""What may be asked of a run, checked and filled in from the file and the recipe; needs no cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import RequestError
from shoal.recipe import Recipe
from shoal.storage import Storage
from shoal.train.revision import code_revision
from shoal.train.spec import RunSpec, identity_of, run_name_of

if TYPE_CHECKING:
    from shoal.config import ClusterConfig, Range
    from shoal.tracking import ResolvedModel
    from shoal.train.session import Precision  # loads torch, which a driver need not


def workers_of(config: ClusterConfig, workers: int | str | Range | None) -> Range:
    """How many workers are meant; None is the file's ``train.workers``.

    Raises:
        RequestError: not a number or a range such as ``1..4``, or a range that allows none.
    """
    from shoal.config import Range

    if workers is None:
        return config.train.workers
    parsed = workers if isinstance(workers, Range) else Range.parse(workers)
    if parsed.min < 1:
        raise RequestError(
            f"workers={workers!r}: a run needs at least 1 worker, such as 1..{max(parsed.max, 1)}"
        )
    return parsed


def plan_run(
    recipe: Recipe,
    config: ClusterConfig,
    storage: Storage,
    *,
    project: Path,
    steps: int | None,
    name: str | None,
    seed: int,
    precision: Precision,
    checkpoint_every: float | str | None,
    keep: int | None,
    init_from: ResolvedModel | None,
) -> RunSpec:
    """A run with every default filled in from the file and the recipe; needs no cluster.

    Raises:
        RequestError: a value that cannot be.
    """
    from shoal.config import Duration

    target_steps = recipe.steps if steps is None else steps
    if target_steps < 1:
        raise RequestError(f"steps={target_steps}: a run has at least 1 step")
    if keep is not None and keep < 1:
        raise RequestError(f"keep={keep}: keep at least 1 checkpoint")
    if precision not in ("fp32", "bf16"):
        raise RequestError(f"precision={precision!r}: choose fp32 or bf16")
    every_s = config.train.checkpoint_every
    if checkpoint_every is not None:
        is_number = isinstance(checkpoint_every, int | float)
        every_s = Duration(float(checkpoint_every)) if is_number else Duration.parse(checkpoint_every)
    init_name = str(init_from) if init_from is not None else None
    identity = identity_of(recipe, seed=seed, precision=precision, shards=None, init_from=init_name)
    return RunSpec(
        recipe=recipe,
        name=name or run_name_of(identity),
        storage=storage,
        target_steps=target_steps,
        seed=seed,
        precision=precision,
        checkpoint_every_s=float(every_s),
        keep=config.train.keep if keep is None else keep,
        init_from=init_from.path if init_from is not None else None,
        init_from_name=init_name,
        revision=code_revision(project),
        threads=1,
    )
