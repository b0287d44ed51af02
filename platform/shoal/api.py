"""What a notebook or a script uses: `connect`, and the cluster it returns.

cluster = shoal.connect()
run = cluster.train(Digits(lr=1e-3), workers="1..4").wait()
model = cluster.models.register("digits", run, alias="champion")
app = cluster.serve("serve_apps.digits:app", model="digits@champion")
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import cluster as clusters
from shoal.capacity import Resources
from shoal.cluster.attach import attach as attach_driver
from shoal.cluster.attach import detach
from shoal.cluster.info import read_record
from shoal.cluster.lifecycle import plan_start, up_plan
from shoal.cluster.warm import add_warm_processes
from shoal.config import ClusterConfig, Range, load
from shoal.errors import ConfigError, NotFoundError, Problem, RequestError, did_you_mean
from shoal.recipe import Recipe
from shoal.storage import Storage
from shoal.tracking import (
    RegisteredModel,
    Registry,
    ResolvedModel,
    RunRecord,
    ensure_tracker,
    list_runs,
    open_registry,
)
from shoal.train.options import plan_run, workers_of
from shoal.train.run import Run
from shoal.train.spec import RunSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from shoal.cluster import ClusterInfo
    from shoal.serve import App
    from shoal.train.session import Precision
    from shoal.tune import Sweep, Trial


logger = logging.getLogger(__name__)

NUM_WARM = 4
"""Worker processes that a new cluster starts ahead of need: a run's controller, two workers, one to spare."""


def connect(project: Path | str | None = None) -> Cluster:
    """Attach to the project's running cluster; on target ``local`` start one if none runs.

    ``project`` is the folder that holds ``cluster.yaml``; None looks in this folder and those above it. Inside a
    job on a cluster it is that cluster, whatever the folder. A cluster started here ends with this process; one
    that ``shoal up`` started stays. Blocks for about 10 s to start one, less than 1 s to attach. Repeating it is
    cheap.

    Raises:
        ConfigError: there is no ``cluster.yaml``, or it has problems; or its storage or tracking is not what the
            running cluster was started with.
        RequestError: none runs, and the file's target is not ``local``.
        ClusterError: the cluster does not start or answer.
    """
    info = clusters.this_cluster()
    if info is None or project is not None:
        config = load(Path(project) if project is not None else None)
        folder = _project_folder(project)
        info = clusters.find(folder) or _start(config, folder)
        _check_same_places(config, info)
    return attach(info)


def attach(info: ClusterInfo) -> Cluster:
    """A handle on a running cluster; makes this process one of its drivers."""
    if str(info.project) not in sys.path:
        sys.path.insert(0, str(info.project))
    attach_driver(info)
    ensure_tracker(info)
    return Cluster(info)


def _project_folder(project: Path | str | None) -> Path:
    from shoal.config.load import find

    if project is not None:
        path = Path(project)
        return (path if path.is_dir() else path.parent).resolve()
    return find().parent.resolve()


def _start(config: ClusterConfig, folder: Path) -> ClusterInfo:
    if config.target != "local":
        raise RequestError(
            f"no cluster of {folder} is running, and connect() starts one only on target 'local' "
            f"(the file says {config.target!r}). Start it: shoal up"
        )
    return bring_up(config, folder, say=logger.info, ends_with_us=True)


def bring_up(
    config: ClusterConfig, project: Path, *, say: Callable[[str], None], ends_with_us: bool = False
) -> ClusterInfo:
    """Start the cluster, with what the first run and the first model will want; or find it running. Blocks.

    ``ends_with_us``: a cluster that this call starts ends with this process; one found running stays.

    Raises:
        ClusterError, RequestError: as `shoal.cluster.up`.
    """
    plan, notes = plan_start(config, project=project)
    info = up_plan(plan, say=say, notes=notes)
    if info.cluster_id == plan.cluster_id:  # else another process started it, before or meanwhile
        if ends_with_us:
            atexit.register(_end, info)
        attach_driver(info)
        ensure_tracker(info)
        add_warm_processes(NUM_WARM)
    return info


def _end(info: ClusterInfo) -> None:
    """End the cluster, unless the project has another by now: one that someone's `shoal up` started."""
    detach()
    recorded = read_record(info.record)
    if recorded is not None and recorded.cluster_id == info.cluster_id:
        clusters.down(info.project)


def _check_same_places(config: ClusterConfig, info: ClusterInfo) -> None:
    """Storage and tracking belong to the cluster: a client that means others must not write there unnoticed."""
    wanted = {
        "storage": str(config.storage_path(info.project)),
        "tracking": config.tracking_uri(info.project),
    }
    running = {"storage": str(info.storage), "tracking": info.tracking}
    problems = [
        Problem(
            path,
            f"the running cluster uses {running[path]}; `shoal down && shoal up` applies the file",
            value,
        )
        for path, value in wanted.items()
        if value != running[path]
    ]
    if problems:
        raise ConfigError(problems)


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
        return Models(self)

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
        init_from: str | None = None,
    ) -> Run:
        """Train the recipe on the cluster; returns at once (`Run.wait` blocks).

        The same recipe with the same fields, seed, precision and ``init_from`` is the same run: repeating the
        call goes on from its last commit, or returns it if it has ``steps`` already.

        Args:
            workers: how many, ``2`` or a range ``"1..4"``; as many of it as are free now. Default: the file's.
            steps: where it ends. Default: the recipe's ``steps``.
            name: default ``<recipe>-<8 hex>``.
            checkpoint_every: seconds, or ``"30s"``. keep: newest checkpoints besides the best. Default: the file's.
            init_from: a model version to start from, ``"digits@1"``.

        Raises:
            IdentityError: ``name`` belongs to a run with another identity.
            RequestError: bad values; more workers than the cluster can ever have; the run is being trained.
            NotFoundError: no such model in ``init_from``.
            StorageError: storage is full or not writable.
        """
        from shoal.train.driver import launch

        spec = self.plan(
            recipe,
            steps=steps,
            name=name,
            seed=seed,
            precision=precision,
            checkpoint_every=checkpoint_every,
            keep=keep,
            init_from=init_from,
        )
        return launch(
            spec,
            workers=self.worker_range(workers),
            resources_per_worker=self.worker_resources(),
            retries=self.config.train.retries,
        )

    def plan(
        self,
        recipe: Recipe,
        *,
        steps: int | None = None,
        name: str | None = None,
        seed: int = 0,
        precision: Precision = "fp32",
        checkpoint_every: float | str | None = None,
        keep: int | None = None,
        init_from: str | None = None,
    ) -> RunSpec:
        """The run that `train` would start, resolved against this cluster; starts nothing.

        Raises:
            RequestError, NotFoundError: as `train`.
        """
        return plan_run(
            recipe,
            self.config,
            self.storage,
            project=self.info.project,
            steps=steps,
            name=name,
            seed=seed,
            precision=precision,
            checkpoint_every=checkpoint_every,
            keep=keep,
            init_from=self.models.resolve(init_from) if init_from else None,
        )

    def worker_range(self, workers: int | str | Range | None) -> Range:
        """How many workers are meant; None is the file's ``train.workers``.

        Raises:
            RequestError: not a number or a range such as ``1..4``, or a range that allows none.
        """
        return workers_of(self.config, workers)

    def worker_resources(self) -> Resources:
        """What one worker holds: a CPU, and a GPU where the run's pool has them."""
        pool = self.config.pools.get(self.config.train.pool or "")
        wants_gpu = pool is not None and pool.max_gpus > 0 and self.info.num_gpus > 0
        return {"CPU": 1, "GPU": 1} if wants_gpu else {"CPU": 1}

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
        **options: Any,
    ) -> Sweep:
        """Search over the recipe's fields; returns at once. Options are those of `shoal.tune.start_sweep`.

        What is not given comes from the file: ``tune`` (trials, concurrent) and ``train`` (checkpoint_every,
        retries, and the pool that says whether a trial's worker holds a GPU).
        """
        from shoal.tune import start_sweep

        options.setdefault("checkpoint_every_s", float(self.config.train.checkpoint_every))
        options.setdefault("retries", self.config.train.retries)
        options.setdefault("gpus_per_worker", self.worker_resources().get("GPU", 0.0))
        return start_sweep(
            self.info,
            recipe,
            space,
            trials=self.config.tune.trials if trials is None else trials,
            concurrent=self.config.tune.concurrent if concurrent is None else concurrent,
            **options,
        )

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


@dataclass(frozen=True)
class Model:
    """One version of a model."""

    resolved: ResolvedModel

    @property
    def name(self) -> str:
        """Such as ``digits@3``."""
        return str(self.resolved)

    @property
    def version(self) -> int:
        return self.resolved.version

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.resolved.aliases

    @property
    def path(self) -> Path:
        """The committed folder that holds it."""
        return self.resolved.path

    def load(self) -> nn.Module:
        """A new module with the weights, in eval mode on the CPU.

        Raises:
            CorruptError: its files were changed, or exchanged with another version's.
            RecipeError, NotFoundError: its recipe is gone or no longer takes these weights.
        """
        from shoal.models import ModelPackage

        return ModelPackage.open(self.path, expect=self.name).load()

    def predict(self, dataset: Dataset[Any], *, batch_size: int = 256) -> Tensor:
        """The model's outputs for every sample of a map-style dataset, in its order. Errors as for `load`."""
        from shoal.models import ModelPackage

        return ModelPackage.open(self.path, expect=self.name).predict(dataset, batch_size=batch_size)

    def __repr__(self) -> str:
        aliases = "".join(f" @{alias}" for alias in self.aliases)
        return f"Model({self.name!r}{aliases}, from run {self.resolved.run!r})"


class Models:
    """The cluster's model registry. Its methods raise TrackingError when tracking does not answer."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._registry: Registry = open_registry(cluster.info)

    def register(self, model: str, source: Run | Trial | Sweep, *, alias: str | None = None) -> Model:
        """Make the best checkpoint of a run, a trial or a sweep's best trial the next version of ``model``. Blocks.

        Raises:
            NotFoundError: the run has no checkpoint.
            RecipeError: the recipe was defined in a notebook: move it to a file.
            CorruptError: the checkpoint's files were changed.
            RequestError: a name or alias that cannot be.
        """
        from shoal.train.export import write_run_package

        run = self._run_of(source)
        resolved = self._registry.register(
            model,
            lambda directory, version: write_run_package(run, directory, model=model, version=version),
            run=run.name,
            alias=alias,
        )
        return Model(resolved)

    def _run_of(self, source: Run | Trial | Sweep) -> Run:
        if isinstance(source, Run):
            return source
        from shoal.tune import Sweep

        trial = source.best if isinstance(source, Sweep) else source
        return find_run(self._cluster.storage, trial.run)

    def get(self, spec: str) -> Model:
        """The version that ``digits@3``, ``digits@champion`` or ``digits`` (the newest) means now."""
        return Model(self._registry.resolve(spec))

    def resolve(self, spec: str) -> ResolvedModel:
        """As `get`, without the handle."""
        return self._registry.resolve(spec)

    def versions(self, model: str) -> list[Model]:
        """Every version of a model, the newest first."""
        return [Model(resolved) for resolved in self._registry.versions(model)]

    def list(self) -> list[RegisteredModel]:
        """Every model that has a version."""
        return self._registry.models()

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point ``alias`` at ``version`` in one step."""
        self._registry.set_alias(model, alias, version)


def find_run(storage: Storage, name: str) -> Run:
    """A handle on an existing run, with or without a cluster.

    Raises:
        NotFoundError: there is none of this name; lists those that exist.
    """
    record = RunRecord(storage, name)
    if record.identity() is None:
        known = [other.name for other in list_runs(storage)]
        there = ", ".join(known[:8]) or "none yet"
        raise NotFoundError(f"there is no run {name!r}; there are: {there}{did_you_mean(name, known)}")
    return Run(record)
