"""A handle on a running cluster: train, tune, serve, and find what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal import cluster as clusters
from shoal.api.models import Models
from shoal.cluster.attach import detach
from shoal.config import ClusterConfig, Range
from shoal.recipe import Recipe
from shoal.storage import Storage
from shoal.tracking import list_runs
from shoal.train.options import RunOptions, plan_run, worker_resources
from shoal.train.run import Run, find_run
from shoal.train.spec import RunSpec

if TYPE_CHECKING:
    from shoal.cluster import ClusterInfo
    from shoal.serve import App
    from shoal.train.bad_steps import OnNan
    from shoal.train.spec import Precision, Strategy
    from shoal.tune import Sweep
    from shoal.tune.options import SchedulerKind


@dataclass(frozen=True)
class Cluster:
    """A running cluster, attached to this process."""

    info: ClusterInfo

    @property
    def config(self) -> ClusterConfig:
        """The ``cluster.yaml`` it was started from."""
        return ClusterConfig.from_dict(self.info.config)

    @property
    def storage(self) -> Storage:
        """Where its runs, sweeps and models are."""
        return Storage(self.info.storage)

    @property
    def models(self) -> Models:
        """Its model registry."""
        return Models(self.info)

    def train(
        self,
        recipe: Recipe,
        *,
        workers: int | str | Range | None = None,
        steps: int | None = None,
        name: str | None = None,
        seed: int = 0,
        precision: Precision = "fp32",
        checkpoint_every: float | str | None = None,
        keep: int | None = None,
        keep_best: int | None = None,
        exact: bool | None = None,
        shards: int | None = None,
        micro_batch: int | None = None,
        strategy: Strategy | None = None,
        on_nan: OnNan | None = None,
        init_from: str | None = None,
    ) -> Run:
        """Train the recipe on the cluster; returns at once (`Run.wait` blocks).

        The same recipe with the same fields, seed, precision, exactness and ``init_from`` is the same run: repeating
        the call goes on from its last commit, or returns it if it has ``steps`` already.

        Args:
            workers: how many, ``2`` or a range ``"1..4"``; as many of it as are free, now and later (`Run.resize`).
                Default: the file's.
            steps: where it ends. Default: the recipe's ``steps``.
            name: default ``<recipe>-<8 hex>``.
            seed: of weights, data order and dropout. precision: of the forward pass.
            checkpoint_every: seconds, ``"30s"`` or ``"auto"``. Default: the file's.
            keep: newest checkpoints to keep. keep_best: best ones to keep besides. Default: the file's.
            exact: the same bits on any number of workers, at some cost (docs/exact.md). Default: the file's.
            shards: of an exact run, the parts of every batch, and the most workers. Default: the file's.
            micro_batch: the most samples that go through the model at a time; the gradients of the parts of a batch
                are accumulated, and the global batch stays. Default: a worker's whole share.
            strategy: what every worker holds: the whole model and optimizer (``ddp``), its part of them (``fsdp``),
                or its part of its machine's copy (``hybrid``). Default: the file's.
            on_nan: at a NaN or infinite loss ``fail``, ``skip`` the batch, or ``rollback`` to the last checkpoint and
                skip it from there. Default: the file's.
            init_from: a model version to start from, ``"digits@1"``.

        Raises:
            IdentityError: ``name`` belongs to a run with another identity.
            RequestError: bad values; more workers than the cluster can ever have; the run is being trained.
            NotFoundError: no such model in ``init_from``.
            StorageError: storage is full or not writable.
        """
        from shoal.train.driver import launch

        options = RunOptions(
            workers=workers,
            steps=steps,
            name=name,
            seed=seed,
            precision=precision,
            checkpoint_every=checkpoint_every,
            keep=keep,
            keep_best=keep_best,
            exact=exact,
            shards=shards,
            micro_batch=micro_batch,
            strategy=strategy,
            on_nan=on_nan,
            init_from=init_from,
        )
        return launch(
            self.plan(recipe, options),
            workers=options.worker_range(self.config),
            resources_per_worker=worker_resources(self.config, self.info),
            retries=self.config.train.retries,
        )

    def plan(self, recipe: Recipe, options: RunOptions) -> RunSpec:
        """The run that `train` would start, resolved against this cluster; starts nothing.

        Raises:
            RequestError, NotFoundError: as `train`.
        """
        init_from = None if options.init_from is None else self.models.resolve(options.init_from)
        return plan_run(
            recipe, options, self.config, self.storage, project=self.info.project, init_from=init_from
        )

    def run(self, name: str) -> Run:
        """A handle on an existing run.

        Raises:
            NotFoundError: there is none of this name; lists those that exist.
        """
        return find_run(self.storage, name)

    def runs(self) -> list[Run]:
        """Every run in the cluster's storage, the newest first."""
        return [Run(record) for record in list_runs(self.storage)]

    def tune(
        self,
        recipe: Recipe,
        space: Mapping[str, Any],
        *,
        trials: int | None = None,
        concurrent: int | None = None,
        workers: int = 1,
        steps: int | None = None,
        name: str | None = None,
        seed: int = 0,
        precision: Precision = "fp32",
        checkpoint_every: float | str | None = None,
        scheduler: SchedulerKind = "asha",
        perturb_every: int | None = None,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float | None = None,
        retries: int | None = None,
    ) -> Sweep:
        """Search the recipe's fields for its best objective; returns at once (`Sweep.wait` blocks).

        Each trial is a run. The same recipe, space, seed, precision and steps are the same sweep: repeating the
        call goes on with it, with more ``trials`` too, or returns it if it is done.

        Args:
            space: what to search, ``{"lr": shoal.loguniform(1e-4, 1e-1)}``; the other fields are the recipe's.
            trials: how many, 1 to 999. concurrent: at a time, at most. Default: the file's.
            workers: of each trial, which waits until there is room for all of them.
            steps: of each trial. Default: the recipe's ``steps``.
            name: default ``<recipe>-sweep-<8 hex>``; its runs are called ``<name>-t001`` and so on.
            seed: of the search and of every trial's run. precision: of the forward pass.
            checkpoint_every: seconds, ``"30s"`` or ``"auto"``. Default: the file's.
            scheduler: ``"asha"`` ends trials early that are worse than others at the same step; ``"pbt"``
                replaces the worst of a population by changed copies of the best; ``"none"`` lets all finish.
            perturb_every: with ``"pbt"``, steps between two comparisons of a trial. Default: about a fifth.
            cpus_per_worker: CPUs, and torch threads, of each worker.
            gpus_per_worker: default 1 where the file's pool for training and the cluster have GPUs, else 0.
            retries: how often processes of a trial that died are started again. Default: the file's.

        Raises:
            IdentityError: ``name`` belongs to another search.
            RequestError: bad values or a space that does not fit the recipe; trials that can never start; the
                sweep is being run.
            StorageError: storage is full or not writable.
            ClusterError: the cluster does not answer.
        """
        from shoal.tune import SweepOptions, start_sweep

        options = SweepOptions(
            trials=trials,
            concurrent=concurrent,
            workers=workers,
            steps=steps,
            name=name,
            seed=seed,
            precision=precision,
            checkpoint_every=checkpoint_every,
            scheduler=scheduler,
            perturb_every=perturb_every,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            retries=retries,
        )
        return start_sweep(self.info, recipe, space, options)

    def serve(self, app: str, *, model: str, name: str | None = None) -> App:
        """Deploy an app (``serve_apps.digits:app``) with a model (``digits@champion``); blocks until it answers.

        Changes a running app in place, without dropping a request. See `shoal.serve.deploy` for errors.
        """
        from shoal.serve import deploy

        return deploy(self.info, app, model=model, name=name)

    def apps(self) -> list[App]:
        """The apps that run."""
        from shoal.serve import apps

        return apps(self.info)

    def down(self) -> None:
        """Stop the cluster and everything on it. What was committed to storage stays."""
        detach()
        clusters.down(self.info.project)

    def __repr__(self) -> str:
        return f"Cluster({self.info.name!r}, {self.info.num_cpus} CPUs, dashboard {self.info.dashboard_url})"
