"""The one error tree.

    ShoalError
    ├── RequestError            the request is impossible; raised before any cluster work, fix the request
    │   ├── ConfigError         cluster.yaml (every problem at once)
    │   ├── RecipeError         a recipe that cannot be trained, or an exception raised by its code
    │   ├── IdentityError       a run of this name exists with another identity
    │   ├── NotFoundError       no such run, model, version, alias, app or recipe
    │   └── AccessError         not allowed: a bind without keys, a wrong token
    ├── EnvironmentFailure      the machines failed us; trying again may help
    │   ├── ClusterError        a cluster that does not start, answer or stop
    │   ├── StorageError        storage that is full, read-only or gone
    │   ├── CorruptError        files that do not match their recorded hashes
    │   ├── TrackingError       tracking that does not answer where it is needed
    │   ├── WorkerLost          workers died more often than we retry
    │   ├── PeerLost            a worker waited in vain for another of its run
    │   ├── SupersededError     another process has taken over the run that this one trained
    │   └── DeadlineExceeded    a wait that ran out; says what it waited for
    └── InternalError           a bug in shoal; please report it

Every message holds what was asked, what was found, and what to do next. Errors keep their
fields through pickling, because they cross processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class ShoalError(Exception):
    """Base of everything shoal raises on purpose; its text is meant to be shown to a person."""


class RequestError(ShoalError):
    """The request is impossible as it stands; nothing was changed."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file or command: where, what was found, and what would be valid."""

    path: str
    """Dotted path of the field, such as ``pools.gpu.nodes``; empty for the file as a whole."""
    message: str
    """What is wrong, and the valid choices."""
    value: str = ""
    """The offending value as written; empty when there is none."""
    origin: str = ""
    """Where it was written, such as ``line 7`` or ``--set``; empty when that is not known."""

    def __str__(self) -> str:
        where = self.path or "(file)"
        details = ", ".join(part for part in (self.value and f"found {self.value}", self.origin) if part)
        return f"{where}: {self.message}" + (f" ({details})" if details else "")


class ConfigError(RequestError):
    """``cluster.yaml`` or an override is wrong; ``problems`` lists every one, not only the first."""

    def __init__(self, problems: Sequence[Problem], *, source: str = "cluster.yaml") -> None:
        self.problems = tuple(problems)
        self.source = source
        lines = [f"{source}: {len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"]
        lines += [f"  {problem}" for problem in self.problems]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> Any:
        return _rebuild_config_error, (self.problems, self.source)


def _rebuild_config_error(problems: tuple[Problem, ...], source: str) -> ConfigError:
    return ConfigError(problems, source=source)


class RecipeError(RequestError):
    """A recipe that cannot be trained as it stands, or an exception raised by its own code.

    ``traceback_text`` is the recipe's own traceback, or empty where none was raised.
    """

    def __init__(self, message: str, *, traceback_text: str = "") -> None:
        self.message = message
        self.traceback_text = traceback_text
        super().__init__(message)

    def __reduce__(self) -> Any:
        return _rebuild_recipe_error, (self.message, self.traceback_text)


def _rebuild_recipe_error(message: str, traceback_text: str) -> RecipeError:
    return RecipeError(message, traceback_text=traceback_text)


class IdentityError(RequestError):
    """The name is taken by a run with another identity; the message shows the difference."""


class NotFoundError(RequestError):
    """No such run, model, version, alias, app or recipe; the message lists those that exist."""


class AccessError(RequestError):
    """Not allowed as asked, such as serving beyond loopback without keys."""


class EnvironmentFailure(ShoalError):
    """The machines failed us, not the request; trying again may help."""


class ClusterError(EnvironmentFailure):
    """The cluster does not start, answer or stop as it should."""


class StorageError(EnvironmentFailure):
    """Storage is full, read-only or gone. What was committed before stays as it was."""


class CorruptError(EnvironmentFailure):
    """Files do not match what was recorded when they were committed; they are not used."""


class TrackingError(EnvironmentFailure):
    """Tracking does not answer, and what was asked cannot be done without it."""


class WorkerLost(EnvironmentFailure):
    """Workers died more often than the run retries; the last committed checkpoint is kept."""


class PeerLost(EnvironmentFailure):
    """A collective failed: another worker died, hangs, or left because of an error of its own."""


class SupersededError(EnvironmentFailure):
    """Another process has taken over what this one wrote; it stops, and what it wrote since is not used."""


class DeadlineExceeded(EnvironmentFailure):
    """A wait ran out of time; the message says what it waited for and what it saw last."""


class InternalError(ShoalError):
    """A bug in shoal."""


def did_you_mean(asked: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``; did you mean digits-1?`` for a message about a name that does not exist; empty when none is near.

    ``cutoff`` is how alike the names must be, from 0 to 1, as in `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(asked, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def from_name(kind: str, message: str, *, traceback_text: str = "") -> ShoalError:
    """The error of this tree that a record names; an `InternalError` when it names none.

    ``traceback_text`` is kept by a `RecipeError` only. A `ConfigError` comes back as the `RequestError` that it
    is: its problems were not recorded one by one.
    """
    found = globals().get(kind)
    if not (isinstance(found, type) and issubclass(found, ShoalError)):
        return InternalError(message)
    if issubclass(found, RecipeError):
        return found(message, traceback_text=traceback_text)
    return RequestError(message) if issubclass(found, ConfigError) else found(message)
