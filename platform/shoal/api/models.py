"""Models: the versions that runs become, and the registry that knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.storage import Storage
from shoal.tracking import RegisteredModel, Registry, ResolvedModel, open_registry
from shoal.train.run import Run, find_run

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from shoal.cluster import ClusterInfo
    from shoal.tune import Sweep, Trial


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
    """The cluster's model registry.

    Its methods raise TrackingError when tracking does not answer, and NotFoundError, which lists what exists, for a
    model, version or alias that does not.
    """

    def __init__(self, info: ClusterInfo) -> None:
        self._storage = Storage(info.storage)
        self._registry: Registry = open_registry(info)

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
        return find_run(self._storage, trial.run)

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
