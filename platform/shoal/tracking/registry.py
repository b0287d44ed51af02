"""Models, versions and aliases: MLflow knows which there are, storage holds their files.

A version is *reserved* in MLflow (which gives the number), then its directory is written by the client,
then it is *marked ready*. Only ready versions are seen, so a crash between the steps leaves nothing to trip
over; what it leaves behind is collected by a later registration, once the writer is dead.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import CorruptError, NotFoundError, RequestError, ShoalError, StorageError, did_you_mean
from shoal.storage import MANIFEST, Storage, check_name, discard
from shoal.storage.owner import FOREIGN_AFTER_S, Owner
from shoal.tracking.delivery import clean_key
from shoal.tracking.mlflow_store import MlflowStore

logger = logging.getLogger(__name__)

_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_RESERVED_ALIAS = re.compile(r"latest|v\d+")  # MLflow's own; `digits` alone already means the latest
_VERSION = re.compile(r"[1-9]\d{0,8}")
_STATE_TAG = "shoal.state"
_WRITER_TAG = "shoal.writer"
_RUN_TAG = "shoal.run"
_PENDING, _READY = "pending", "ready"


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """One version of a model, and where its files are."""

    model: str
    version: int
    path: Path
    """A committed directory; verify it before use (``ModelPackage.open`` does)."""
    aliases: tuple[str, ...] = ()
    run: str = ""
    """The run it came from; empty if unknown."""
    created: float = 0.0
    """Epoch seconds."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What was recorded with it; shoal's own tags left out."""

    def __str__(self) -> str:
        return f"{self.model}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A model's name, its newest version and where its aliases point."""

    model: str
    latest: int
    num_versions: int
    aliases: Mapping[str, int]


class RegistryBackend(Protocol):
    """What `Registry` needs: the tracker's registry, in this process or behind an actor."""

    def reserve(self, model: str, *, writer: Mapping[str, Any], run: str | None) -> int: ...
    def mark_ready(self, model: str, version: int, *, tags: Mapping[str, str]) -> None: ...
    def abandon(self, model: str, version: int) -> None: ...
    def set_alias(self, model: str, alias: str, version: int) -> None: ...
    def resolve(self, spec: str) -> ResolvedModel: ...
    def versions(self, model: str) -> list[ResolvedModel]: ...
    def models(self) -> list[RegisteredModel]: ...


class Registry:
    """The model registry as clients use it.

    Every method raises TrackingError when tracking does not answer within its deadline; NotFoundError,
    listing what exists, for a model, version or alias that does not; RequestError for a name that cannot be.
    """

    def __init__(self, backend: RegistryBackend, storage: Storage) -> None:
        self._backend = backend
        self._storage = storage

    def register(
        self,
        model: str,
        write: Callable[[Path, int], object],
        *,
        run: str | None = None,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> ResolvedModel:
        """Make the next version of ``model`` from what ``write(directory, version)`` commits, and return it.

        The version is seen by nobody until ``directory`` is committed (`shoal.models.write_package` does
        that), and never if ``write`` raises or this process dies. ``alias`` is moved to it last. Repeating it
        after an error makes another version, never half of one.

        Raises:
            StorageError: ``write`` came back without a committed directory.
        """
        check_name("model", model)
        if alias is not None:
            check_alias(alias)
        version = self._backend.reserve(model, writer=asdict(Owner.here()), run=run)
        directory = self._storage.model_dir(model, version)
        try:
            write(directory, version)
            self._backend.mark_ready(model, version, tags=dict(tags or {}))
        except BaseException:
            self._abandon(model, version)
            raise
        if alias is not None:
            self._backend.set_alias(model, alias, version)
        return self._backend.resolve(f"{model}@{version}")

    def resolve(self, spec: str) -> ResolvedModel:
        """The version that ``digits@3``, ``digits@champion`` or ``digits`` (the newest) means now."""
        parse_spec(spec)
        return self._backend.resolve(spec)

    def versions(self, model: str) -> list[ResolvedModel]:
        """Every version of ``model``, the newest first."""
        return self._backend.versions(check_name("model", model))

    def models(self) -> list[RegisteredModel]:
        """Every model that has a version, by name."""
        return self._backend.models()

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point ``alias`` at ``version``, in one step: nobody sees it point nowhere."""
        self._backend.set_alias(check_name("model", model), check_alias(alias), version)

    def _abandon(self, model: str, version: int) -> None:
        try:
            self._backend.abandon(model, version)
        except ShoalError:
            logger.warning(
                "%s@%d stays reserved, unseen, until a later registration collects it",
                model,
                version,
                exc_info=True,
            )


class RegistryStore:
    """The registry on the tracker's side; the one writer. Methods as in `Registry`, each a single step.

    Safe to use from several threads, as the tracker's actor does.
    """

    def __init__(
        self,
        store: Callable[[], MlflowStore],
        storage: Storage,
        *,
        run_id: Callable[[str], str | None] = lambda run: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._storage = storage
        self._run_id = run_id
        self._clock = clock
        # MLflow looks before it inserts: of two threads that set a new alias, one would get an IntegrityError.
        self._writing = threading.Lock()

    def reserve(self, model: str, *, writer: Mapping[str, Any], run: str | None) -> int:
        """The number of a new version that nobody sees yet, for the process ``writer`` to fill."""
        check_name("model", model)
        store = self._store()
        tags = {_STATE_TAG: _PENDING, _WRITER_TAG: str(Owner(**writer))}
        if run is not None:
            tags[_RUN_TAG] = run
        taken: list[int] = []
        with self._writing, store.translated():
            self._ensure_model(store, model)
            self._collect(store, model)
            while True:
                made = store.client.create_model_version(
                    model,
                    source=f"shoal://models/{model}",  # not a path: servers refuse those
                    run_id=self._run_id(run) if run is not None else None,
                    tags=tags,
                    await_creation_for=0,
                )
                version = int(made.version)
                if not self._storage.model_dir(model, version).exists():
                    break
                taken.append(
                    version
                )  # files of a version MLflow forgot: not written over, nor numbered again
            for number in taken:
                store.client.delete_model_version(model, str(number))
        return version

    def mark_ready(self, model: str, version: int, *, tags: Mapping[str, str]) -> None:
        """Let everybody see a version whose files are committed. Repeating it is safe."""
        directory = self._storage.model_dir(model, version)
        if not (directory / MANIFEST).is_file():
            raise StorageError(f"{directory} holds no committed model; {model}@{version} is not registered")
        store = self._store()
        with self._writing, store.translated():
            for key, value in {**tags, _STATE_TAG: _READY}.items():  # the state last: it publishes
                store.client.set_model_version_tag(model, str(version), clean_key(key), value)

    def abandon(self, model: str, version: int) -> None:
        """Give up a reserved version and what was written of it. One that is ready or gone stays as it is."""
        store = self._store()
        check_name("model", model)
        filter_string = f"name='{model}'"
        with self._writing:
            for found in store.all_pages(store.client.search_model_versions, filter_string):
                if int(found.version) == version and found.tags.get(_STATE_TAG) == _PENDING:
                    self._remove(store, model, version)

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point ``alias`` at a ready ``version``, replacing where it pointed in one step."""
        check_alias(alias)
        self.resolve(f"{model}@{version}")
        store = self._store()
        with self._writing, store.translated():
            store.client.set_registered_model_alias(model, alias, str(version))

    def resolve(self, spec: str) -> ResolvedModel:
        """The ready version that ``spec`` means."""
        model, selector = parse_spec(spec)
        versions = self.versions(model)
        if selector is None:
            return self._with_files(versions[0])
        by_key = {str(version.version): version for version in versions}
        by_key |= {alias: version for version in versions for alias in version.aliases}
        if selector not in by_key:
            kind = "version" if _VERSION.fullmatch(selector) else "alias"
            aliases = sorted(alias for version in versions for alias in version.aliases)
            numbers = [str(version.version) for version in reversed(versions)]
            exist = f"versions {_listed(numbers)}; aliases {_listed(aliases)}"
            raise NotFoundError(
                f"model {model!r} has no {kind} {selector!r}{did_you_mean(selector, by_key)} (it has {exist})"
            )
        return self._with_files(by_key[selector])

    def versions(self, model: str) -> list[ResolvedModel]:
        """Every ready version of ``model``, the newest first; never empty."""
        check_name("model", model)
        store = self._store()
        ready = self._ready(store, f"name='{model}'")
        if not ready:
            names = [known.model for known in self.models()]
            raise NotFoundError(
                f"no model {model!r}{did_you_mean(model, names)} (models: {_listed(names)}). "
                "Make one from a run with cluster.models.register(...)"
            )
        with store.translated():
            aliases = store.client.get_registered_model(model).aliases
        return sorted((self._resolved(found, aliases) for found in ready), key=lambda it: -it.version)

    def models(self) -> list[RegisteredModel]:
        """Every model with at least one ready version, by name."""
        store = self._store()
        numbers: dict[str, list[int]] = {}
        for found in self._ready(store, None):
            numbers.setdefault(found.name, []).append(int(found.version))
        aliases = {
            found.name: found.aliases for found in store.all_pages(store.client.search_registered_models)
        }
        return [
            RegisteredModel(
                model=name,
                latest=max(numbers[name]),
                num_versions=len(numbers[name]),
                aliases={alias: int(version) for alias, version in sorted(aliases.get(name, {}).items())},
            )
            for name in sorted(numbers)
        ]

    def _ready(self, store: MlflowStore, filter_string: str | None) -> list[Any]:
        found = store.all_pages(store.client.search_model_versions, filter_string)
        return [version for version in found if version.tags.get(_STATE_TAG) == _READY]

    def _resolved(self, found: Any, aliases: Mapping[str, Any]) -> ResolvedModel:
        version = int(found.version)
        return ResolvedModel(
            model=found.name,
            version=version,
            path=self._storage.model_dir(found.name, version),
            aliases=tuple(sorted(alias for alias, number in aliases.items() if int(number) == version)),
            run=found.tags.get(_RUN_TAG, ""),
            created=found.creation_timestamp / 1000,
            tags={key: value for key, value in found.tags.items() if not key.startswith("shoal.")},
        )

    def _with_files(self, version: ResolvedModel) -> ResolvedModel:
        if not version.path.is_dir():
            raise CorruptError(f"{version} is registered, but its files are gone: {version.path}")
        return version

    def _ensure_model(self, store: MlflowStore, model: str) -> None:
        from mlflow.exceptions import MlflowException

        with store.translated():
            try:
                store.client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _collect(self, store: MlflowStore, model: str) -> None:
        """Remove reservations whose writer died before marking them ready."""
        for found in store.all_pages(store.client.search_model_versions, f"name='{model}'"):
            if found.tags.get(_STATE_TAG) != _PENDING:
                continue
            age_s = self._clock() - found.creation_timestamp / 1000
            is_gone = _is_gone(found.tags.get(_WRITER_TAG, ""))
            if is_gone or (is_gone is None and age_s > FOREIGN_AFTER_S):
                logger.info("removing %s@%s, whose registration was cut off", model, found.version)
                self._remove(store, model, int(found.version))

    def _remove(self, store: MlflowStore, model: str, version: int) -> None:
        # The files first: an MLflow that gives numbers again (its SQL store does not) must find none.
        discard(self._storage.model_dir(model, version))
        with store.translated():
            store.client.delete_model_version(model, str(version))


def check_alias(alias: str) -> str:
    """``alias``, if it may be one; RequestError if not. It never looks like a version."""
    if not isinstance(alias, str) or not _ALIAS.fullmatch(alias):
        raise RequestError(
            f"{alias!r} cannot be an alias: use 1 to 64 of a-z, 0-9, '_' and '-', beginning with a letter"
        )
    if _RESERVED_ALIAS.fullmatch(alias):
        raise RequestError(
            f"{alias!r} cannot be an alias: MLflow reserves 'latest' and 'v<number>'. "
            "The model's name alone means its newest version, model@3 its third"
        )
    return alias


def parse_spec(spec: str) -> tuple[str, str | None]:
    """Model, and version or alias or ``None``, of ``digits@3``, ``digits@champion`` or ``digits``.

    Raises:
        RequestError: ``spec`` has none of these forms.
    """
    model, at, selector = spec.partition("@")
    check_name("model", model)
    if not at:
        return model, None
    if not _VERSION.fullmatch(selector):
        check_alias(selector)
    return model, selector


def _is_gone(writer: str) -> bool | None:
    owner = Owner.parse(writer)
    return None if owner is None else owner.is_gone()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
