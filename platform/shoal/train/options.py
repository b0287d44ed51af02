"""How a run is asked for: its options, and the run that they mean once file and recipe have filled them in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from shoal.errors import RequestError
from shoal.recipe import Recipe
from shoal.storage import Storage
from shoal.train.bad_steps import OnNan
from shoal.train.option_rules import (
    Rule,
    check,
    interval,
    is_interval,
    is_text,
    is_worker_range,
    one_of,
    whole_number,
)
from shoal.train.revision import code_revision
from shoal.train.spec import Precision, RunSpec, Strategy, default_name, identity_of

if TYPE_CHECKING:
    from shoal.capacity import Resources
    from shoal.cluster import ClusterInfo
    from shoal.config import ClusterConfig, Range
    from shoal.tracking import ResolvedModel

RULES = {
    "workers": Rule(
        is_worker_range, "at least 1 worker: a number, such as 2, or a range, such as '1..4', the least first"
    ),
    "steps": Rule(whole_number(1), "a whole number, 1 or more, such as 2000"),
    "name": Rule(is_text, "a text, such as 'first-try'"),
    "seed": Rule(whole_number(), "a whole number, such as 7"),
    "precision": Rule(one_of(*get_args(Precision)), "'fp32' or 'bf16'"),
    "checkpoint_every": Rule(
        is_interval,
        "from 1 ms to 100 years: seconds, such as 30, or a text with a unit, such as '30s'; or 'auto'",
    ),
    "keep": Rule(whole_number(1), "a whole number, 1 or more, such as 3"),
    "keep_best": Rule(whole_number(1), "a whole number, 1 or more, such as 3"),
    "exact": Rule(lambda value: isinstance(value, bool), "True or False"),
    "shards": Rule(whole_number(1), "a whole number, 1 or more, such as 8; it goes with exact"),
    "micro_batch": Rule(whole_number(1), "a whole number, 1 or more, such as 8"),
    "strategy": Rule(one_of(*get_args(Strategy)), "'ddp', 'fsdp' or 'hybrid'"),
    "on_nan": Rule(one_of(*get_args(OnNan)), "'fail', 'skip' or 'rollback'"),
    "init_from": Rule(is_text, "a version of a model as text, such as 'digits@1'"),
}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is to be trained.

    Raises:
        RequestError: values that cannot be; says of each what would.
    """

    workers: int | str | Range | None = None
    """How many: ``2``, or of a range ``"1..4"`` as many as are free. None: the file's."""
    steps: int | None = None
    """Where the run ends. None: the recipe's ``steps``."""
    name: str | None = None
    """None: ``<recipe>-<8 hex of the identity>``, so the same command finds the same run."""
    seed: int = 0
    """Of weights, data order and dropout."""
    precision: Precision = "fp32"
    """Of the forward pass."""
    checkpoint_every: float | str | None = None
    """The most work a crash can cost, in seconds or as ``"30s"``; ``"auto"`` for as often as costs 1 % of the time.
    None: the file's."""
    keep: int | None = None
    """Newest checkpoints to keep besides the best. None: the file's."""
    keep_best: int | None = None
    """Best checkpoints to keep, by the recipe's objective. None: the file's."""
    exact: bool | None = None
    """Whether the weights are to be the same bits on any number of workers. None: the file's."""
    shards: int | None = None
    """Of an exact run, into how many shards every batch is divided, which is the most workers it can have.
    None: the file's."""
    micro_batch: int | None = None
    """The most samples that go through the model at a time; the gradients of a batch's parts are accumulated."""
    strategy: Strategy | None = None
    """What every worker holds of the model and the optimizer. None: the file's."""
    on_nan: OnNan | None = None
    """What to do when a loss is NaN or infinite: ``fail``, ``skip`` the batch, or ``rollback`` to the last checkpoint
    and skip it from there. None: the file's."""
    init_from: str | None = None
    """A model version whose weights a fresh run starts from, such as ``"digits@1"``."""

    def __post_init__(self) -> None:
        check(self, RULES)

    def worker_range(self, config: ClusterConfig) -> Range:
        """How many workers are meant.

        Raises:
            RequestError: more than an exact run has shards.
        """
        from shoal.config import Range

        asked = config.train.workers if self.workers is None else Range.parse(self.workers)
        shards = self.num_shards(config)
        if shards is None or asked.max <= shards:
            return asked
        if asked.min > shards:
            raise RequestError(
                f"workers={asked}: an exact run of {shards} shards takes 1 to {shards} workers; "
                f"ask for fewer, or start another run with shards={asked.min} or more"
            )
        return Range(asked.min, shards)

    def num_shards(self, config: ClusterConfig) -> int | None:
        """How many shards an exact run has; None of a fast one.

        Raises:
            RequestError: shards of a run that is not to be exact.
        """
        if config.train.exact if self.exact is None else self.exact:
            return config.train.shards if self.shards is None else self.shards
        if self.shards is not None:
            raise RequestError(
                f"shards={self.shards}: only an exact run has shards; add exact=True (--exact)"
            )
        return None


def plan_run(
    recipe: Recipe,
    options: RunOptions,
    config: ClusterConfig,
    storage: Storage,
    *,
    project: Path,
    init_from: ResolvedModel | None = None,
) -> RunSpec:
    """A run with every default filled in from the file and the recipe; needs no cluster.

    ``init_from`` is what ``options.init_from`` names, which takes a registry to find.

    Raises:
        RequestError: the recipe's own ``steps`` cannot be; shards of a run that is not to be exact; an exact run
            whose batch has fewer samples than shards, with another strategy than ddp, or with a micro-batch.
    """
    steps = recipe.steps if options.steps is None else options.steps
    if not RULES["steps"].fits(steps):
        raise RequestError(f"{type(recipe).__name__}.steps={steps!r}: {RULES['steps'].valid}")
    every = options.checkpoint_every
    init_name = None if init_from is None else str(init_from)
    shards = options.num_shards(config)
    strategy = config.train.strategy if options.strategy is None else options.strategy
    if shards is not None:
        _check_exact(shards, recipe, strategy, options.micro_batch)
    identity = identity_of(
        recipe, seed=options.seed, precision=options.precision, shards=shards, init_from=init_name
    )
    return RunSpec(
        recipe=recipe,
        name=default_name(identity) if options.name is None else options.name,
        storage=storage,
        target_steps=steps,
        seed=options.seed,
        precision=options.precision,
        shards=shards,
        strategy=strategy,
        micro_batch=options.micro_batch,
        on_nan=config.train.on_nan if options.on_nan is None else options.on_nan,
        checkpoint_every_s=(config.train.checkpoint_every if every is None else interval(every)).seconds,
        keep=config.train.keep if options.keep is None else options.keep,
        keep_best=config.train.keep_best if options.keep_best is None else options.keep_best,
        init_from=None if init_from is None else init_from.path,
        init_from_name=init_name,
        revision=code_revision(project),
        threads=1,
    )


def _check_exact(shards: int, recipe: Recipe, strategy: Strategy, micro_batch: int | None) -> None:
    """Raise a RequestError where an exact run cannot be as asked."""
    if recipe.batch_size < shards:
        raise RequestError(
            f"exact: a batch of {recipe.batch_size} samples cannot be divided into {shards} shards; "
            f"set shards={recipe.batch_size} or less, or raise batch_size"
        )
    if strategy != "ddp":
        raise RequestError(
            f"strategy={strategy}: an exact run takes ddp, where every worker sums in one order; "
            "leave one of the two out"
        )
    if micro_batch is not None:
        raise RequestError(
            f"micro_batch={micro_batch}: an exact run takes its batch in shards; for smaller ones start another "
            f"run with more than shards={shards}"
        )


def worker_resources(config: ClusterConfig, info: ClusterInfo) -> Resources:
    """What one worker holds: a CPU, and a GPU where the run's pool and the cluster have them."""
    pool = config.pools.get(config.train.pool or "")
    wants_gpu = pool is not None and pool.max_gpus > 0 and info.num_gpus > 0
    return {"CPU": 1, "GPU": 1} if wants_gpu else {"CPU": 1}
