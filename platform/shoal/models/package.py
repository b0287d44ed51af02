"""A model version as a committed directory: ``model.safetensors`` and ``model.json``."""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import CorruptError, NotFoundError, RecipeError, RequestError
from shoal.models.lineage import Lineage, check_reference
from shoal.models.tensors import load_tensors, save_tensors
from shoal.recipe import Recipe, from_fields, load_recipe
from shoal.storage import Manifest, commit, read_json, verify
from shoal.storage.disk import storage_error

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
KIND = "model"
FORMAT = 1


def write_package(
    directory: Path, weights: Mapping[str, Tensor], *, model: str, version: int, lineage: Lineage
) -> Manifest:
    """Commit weights as version ``version`` of ``model``; what is written is known to load.

    ``weights`` is a module's ``state_dict()``. Parameters and buffers are stored; tied weights
    stay tied. Blocks until they are on disk, and builds the recipe's model once to see that it takes the weights.

    Raises:
        RecipeError: another process could not build the model: the recipe is not in an importable file, its
            ``build_model`` fails, or its model does not take them.
        NotFoundError: the recipe is not where ``lineage`` says.
        StorageError: ``directory`` exists, or the disk is full, read-only or gone.
    """
    _fit(_build(_recipe(lineage)), weights, lineage)
    description = {"format": FORMAT, "model": model, "version": version, "lineage": lineage.as_dict()}

    def write(target: Path) -> None:
        save_tensors(target / WEIGHTS, weights)
        (target / DESCRIPTION).write_text(json.dumps(description, indent=2))

    return commit(directory, write, meta={"kind": KIND, "model": model, "version": version})


@dataclass(frozen=True)
class ModelPackage:
    """A verified model version on disk. Nothing of it has run yet; `load` imports its recipe."""

    directory: Path
    model: str
    version: int
    lineage: Lineage
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, directory: Path, *, expect: str | None = None) -> ModelPackage:
        """The package in ``directory``, after comparing every byte with its manifest. Runs no code of it.

        ``expect`` is the version that it must hold, such as ``digits@3``; None takes any.

        Raises:
            NotFoundError: there is no such directory.
            CorruptError: its files were changed, it is not a model, or it holds another version than expected.
            StorageError: it cannot be read.
        """
        if not directory.exists():
            raise NotFoundError(f"there is no model in {directory}; `shoal models` lists those that exist")
        manifest = verify(directory)
        if manifest.meta.get("kind") != KIND or not {WEIGHTS, DESCRIPTION} <= manifest.files.keys():
            raise CorruptError(f"{directory} is no model: it needs {WEIGHTS} and {DESCRIPTION}")
        match read_json(directory / DESCRIPTION):
            case {
                "format": written,
                "model": str(model),
                "version": int(version),
                "lineage": lineage,
            } if written == FORMAT:
                try:
                    package = cls(directory, model, version, Lineage.from_dict(lineage), manifest)
                except ValueError as error:
                    reason = str(error)
                else:
                    if expect not in (None, package.name):
                        raise CorruptError(
                            f"{directory} holds {package.name}, not {expect}: were folders exchanged? Nothing of "
                            "it is used; put each version back into its own folder"
                        )
                    return package
            case _:
                reason = f"shoal reads format {FORMAT} with model, version and lineage"
        raise CorruptError(f"{directory / DESCRIPTION} does not describe a model: {reason}")

    @property
    def name(self) -> str:
        """Such as ``digits@3``."""
        return f"{self.model}@{self.version}"

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe that made the model, with the same fields.

        Runs code: the module that ``model.json`` names is imported, from your path only, and whatever it is, that
        runs it. So open packages of strangers as you would run a script of yours with an argument of theirs.

        Raises:
            NotFoundError: the module or class is not there, or is not a recipe.
            RecipeError: the module cannot be imported by name or fails, or no longer has the same fields.
        """
        return _recipe(self.lineage)

    def load(self) -> nn.Module:
        """A new module with the weights, in eval mode on the CPU. Leaves torch's random state as it was.

        Runs the recipe's ``build_model``, see `recipe`; of the package itself nothing is run, weights are data.

        The files are verified once more, so what is loaded is what was committed.

        Raises:
            NotFoundError, RecipeError: as for `recipe`; or its model no longer takes these weights.
            CorruptError: the files were changed since `open`.
            StorageError: they cannot be read.
        """
        net = _build(self.recipe)
        if verify(self.directory) != self.manifest:
            raise CorruptError(
                f"{self.directory} holds another model than when it was opened. Open it again."
            )
        try:
            weights = load_tensors(self.directory / WEIGHTS)
        except OSError as error:
            raise storage_error("read", self.directory / WEIGHTS, error) from error
        _fit(net, weights, self.lineage)
        return net.eval()

    def predict(self, dataset: Dataset[Any], batch_size: int = 256) -> Tensor:
        """The model's outputs for all samples of a map-style ``dataset``, in its order; first axis: samples.

        A sample is an input, or a tuple of input and target, which is ignored. The model is loaded on the
        first call and kept.

        Raises:
            RequestError: no samples, or ``batch_size`` below 1.
            RecipeError: the model returns something else than one tensor row per sample.
            All that `load` raises.
        """
        import torch

        if batch_size < 1 or len(dataset) < 1:  # type: ignore[arg-type]
            raise RequestError(f"nothing to predict: {len(dataset)} samples by {batch_size}")  # type: ignore[arg-type]
        outputs: list[Tensor] = []
        with torch.inference_mode():
            for inputs, num_samples in _input_batches(dataset, batch_size):
                output = self._net(inputs)
                if not isinstance(output, torch.Tensor) or output.shape[:1] != (num_samples,):
                    found = (
                        f"shape {tuple(output.shape)}" if hasattr(output, "shape") else type(output).__name__
                    )
                    raise RecipeError(
                        f"{self.name} answers {num_samples} samples with {found}; predict needs one row each"
                    )
                outputs.append(output)
        return torch.cat(outputs)

    @functools.cached_property
    def _net(self) -> nn.Module:
        return self.load()


def _input_batches(dataset: Dataset[Any], batch_size: int) -> Iterator[tuple[Any, int]]:
    from torch.utils.data import default_collate

    num_samples = len(dataset)  # type: ignore[arg-type]
    for start in range(0, num_samples, batch_size):
        samples = [dataset[index] for index in range(start, min(start + batch_size, num_samples))]
        inputs = [s[0] if isinstance(s, tuple) and len(s) == 2 else s for s in samples]
        yield default_collate(inputs), len(inputs)


def _recipe(lineage: Lineage) -> Recipe:
    check_reference(lineage.recipe)  # a notebook's when writing, anything when reading from elsewhere
    return from_fields(load_recipe(lineage.recipe), dict(lineage.fields))


def _build(recipe: Recipe) -> nn.Module:
    """The recipe's untrained model, the same each time, without touching the caller's random numbers."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            net = recipe.build_model()
        except Exception as error:
            raise RecipeError(
                f"{type(recipe).__name__}.build_model() failed: {type(error).__name__}: {error}",
                traceback_text=traceback.format_exc(),
            ) from error
    if not isinstance(net, torch.nn.Module):
        raise RecipeError(
            f"{type(recipe).__name__}.build_model() returned a {type(net).__name__}, no nn.Module"
        )
    return net


def _fit(net: nn.Module, weights: Mapping[str, Tensor], lineage: Lineage) -> None:
    try:
        net.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        revision = f" (code revision {lineage.code_revision})" if lineage.code_revision else ""
        raise RecipeError(
            f"the model that {lineage.recipe} builds does not take these weights, of run {lineage.run}"
            f"{revision}. Has its code changed? {error}"
        ) from error
