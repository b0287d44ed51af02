"""Models, versions and aliases: MLflow knows which there are, storage holds their files.

A version is *reserved* in MLflow (which gives the number), then its directory is written by the client,
then it is *marked ready*. Only ready versions are seen, so a crash between the steps leaves nothing to trip
over; what it leaves behind is collected by a later registration, once the writer is dead.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import RequestError, ShoalError
from shoal.storage import Storage, check_name
from shoal.storage.owner import Owner

logger = logging.getLogger(__name__)

_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_RESERVED_ALIAS = re.compile(r"latest|v\d+")  # MLflow's own; `digits` alone already means the latest
_VERSION = re.compile(r"[1-9]\d{0,8}")


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
    def mark_ready(self, model: str, version: int) -> None: ...
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
            self._backend.mark_ready(model, version)
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
