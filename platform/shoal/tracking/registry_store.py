"""The registry on the tracker's side: what becomes of reservations, versions and aliases in MLflow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shoal.errors import CorruptError, NotFoundError, StorageError, did_you_mean
from shoal.storage import MANIFEST, Storage, check_name, discard
from shoal.storage.owner import FOREIGN_AFTER_S, Owner
from shoal.tracking.mlflow_store import MlflowStore
from shoal.tracking.registry import RegisteredModel, ResolvedModel, check_alias, parse_spec

logger = logging.getLogger(__name__)

_STATE_TAG = "shoal.state"
_WRITER_TAG = "shoal.writer"
_RUN_TAG = "shoal.run"
_NUMBERED, _PENDING, _READY = "numbered", "pending", "ready"
"""A version's life: it has a number; its number has no files, so that a writer may make them; it is whole."""


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
    ) -> None:
        self._store = store
        self._storage = storage
        self._run_id = run_id
        # MLflow looks before it inserts: of two threads that set a new alias, one would get an IntegrityError.
        self._writing = threading.Lock()

    def reserve(self, model: str, *, writer: Mapping[str, Any], run: str | None) -> int:
        """The number of a new version that nobody sees yet, for the process ``writer`` to fill."""
        check_name("model", model)
        store = self._store()
        tags = {_STATE_TAG: _NUMBERED, _WRITER_TAG: str(Owner(**writer))}
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
                # Files of a version MLflow forgot: not written over, nor numbered again.
                taken.append(version)
            # Only now: what is pending is removed with its files when its writer dies, and those are not his.
            store.client.set_model_version_tag(model, str(version), _STATE_TAG, _PENDING)
            for number in taken:
                store.client.delete_model_version(model, str(number))
        return version

    def mark_ready(self, model: str, version: int) -> None:
        """Let everybody see a version whose files are committed. Repeating it is safe."""
        directory = self._storage.model_dir(model, version)
        if not (directory / MANIFEST).is_file():
            raise StorageError(f"{directory} holds no committed model; {model}@{version} is not registered")
        store = self._store()
        with self._writing, store.translated():
            store.client.set_model_version_tag(model, str(version), _STATE_TAG, _READY)

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
            kind = "version" if selector.isdecimal() else "alias"
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
                f"Make one from a run: cluster.models.register({model!r}, run), or: shoal register {model} RUN"
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
            state = found.tags.get(_STATE_TAG)
            if state == _NUMBERED:  # `reserve` was cut off: no writer ever had the number
                with store.translated():
                    store.client.delete_model_version(model, str(found.version))
            if state != _PENDING:
                continue
            age_s = time.time() - found.creation_timestamp / 1000
            is_gone = _is_gone(found.tags.get(_WRITER_TAG, ""))
            if is_gone or (is_gone is None and age_s > FOREIGN_AFTER_S):
                logger.info("removing %s@%s, whose registration was cut off", model, found.version)
                self._remove(store, model, int(found.version))

    def _remove(self, store: MlflowStore, model: str, version: int) -> None:
        # The files first: an MLflow that gives numbers again (its SQL store does not) must find none.
        discard(self._storage.model_dir(model, version))
        with store.translated():
            store.client.delete_model_version(model, str(version))


def _is_gone(writer: str) -> bool | None:
    owner = Owner.parse(writer)
    return None if owner is None else owner.is_gone()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
