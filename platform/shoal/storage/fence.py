"""A fence around what only one may write at a time: of two who both believe they are the one, the older stops.

A lock is not enough. Its holder may sleep (a stopped process, a paused machine), lose it, and go on; and not every
file system knows locks. Whoever begins to write takes the next *token*, a number that is given out once. The newest
token's file says which commits of older tokens still count: those that its holder went on from. So what an
older holder commits later is not read, whatever it believes, and it learns of that before it commits, or right after
(Kleppmann, How to do distributed locking, 2016).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import CorruptError, NotFoundError, StorageError, SupersededError
from shoal.storage.store import Store

NO_TOKEN = 0
"""Of what was committed before there were tokens, or was put there from elsewhere."""
LAST_TOKEN = 999_999
"""Six digits: names sort by number."""

_NAME = re.compile(r"([0-9]{6})\.json")
_ATTEMPTS = 100
"""How often somebody else may be faster; each time is a start of theirs."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Succession:
    """Which commits count, by their step and token."""

    token: int = NO_TOKEN
    """The newest token whose holder has begun; what it or a later one commits counts."""
    older: Mapping[int, int] = field(default_factory=dict)
    """By older token, the last step of its commits that counts; a token that is not here has none."""

    def counts(self, step: int, token: int) -> bool:
        """Whether the commit of ``step`` under ``token`` is one that readers use."""
        return token >= self.token or step <= self.older.get(token, -1)

    def up_to(self, begun: tuple[int, int] | None, commits: Iterable[tuple[int, int]]) -> dict[int, int]:
        """`older` for a holder that goes on from the commit ``begun``; None begins anew, and nothing old counts.

        ``begun`` and each of ``commits``, which are those that are there, are (step, token).
        """
        last: dict[int, int] = {}
        for step, token in commits:
            is_before = begun is not None and (step < begun[0] or (step, token) == begun)
            if is_before and self.counts(step, token):
                last[token] = max(step, last.get(token, step))
        return last


@dataclass(frozen=True)
class Token:
    """The right to write, until somebody takes the next. May be sent to other processes, which then share it."""

    fence: Store
    number: int
    """From 1; greater than every one before."""
    driver: int
    """The number with which the driver began whose attempt holds this one; its own where there is none."""

    def check(self) -> None:
        """Pass if nobody has taken a later token. Takes microseconds.

        Raises:
            SupersededError: somebody has; nothing may be written any more.
            StorageError: the fence cannot be read.
        """
        newest = max(_numbers(self.fence), default=NO_TOKEN)
        if newest > self.number:
            raise _superseded(self.fence, newest, self.number)

    def check_driver(self) -> None:
        """Pass if every later token was taken by an attempt of the driver whose token this is.

        Raises:
            SupersededError, StorageError: as `check`.
        """
        newest, content = _newest(self.fence)
        if newest > self.number and content.get("driver") != self.driver:
            raise _superseded(self.fence, newest, self.number)

    def begin(self, older: Mapping[int, int]) -> None:
        """Say which older commits count (`Succession.up_to`); from now on no other one does. Before the first write.

        Raises:
            SupersededError: somebody has taken a later token.
            StorageError: it cannot be written.
        """
        counting = {str(token): step for token, step in older.items()}
        self.fence.put(_key(self.number), _content(self.driver, counting))
        self.check()
        _remove(self.fence, [number for number in _numbers(self.fence) if number < self.number])


class Fence:
    """The tokens in a ``store`` of their own: one small object each, of which at most the last few stay."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def take(self, *, driver: int | None = None, above: int = NO_TOKEN) -> Token:
        """The next token, greater than ``above`` too; who holds an earlier one is superseded.

        ``driver`` is the number with which the driver of this attempt began. Its attempts supersede each other,
        and never a later driver.

        Raises:
            SupersededError: a later driver has taken over.
            StorageError: the fence cannot be written.
        """
        for _ in range(_ATTEMPTS):
            newest, content = _newest(self.store)
            if driver is not None and newest > driver and content.get("driver") != driver:
                raise _superseded(self.store, newest, driver)
            number = max(newest, above) + 1
            if number > LAST_TOKEN:
                raise StorageError(
                    f"{self.store} has given out all of its {LAST_TOKEN} tokens; use another name"
                )
            token = Token(self.store, number, number if driver is None else driver)
            if not self.store.create(_key(number), _content(token.driver, None)):
                continue
            # While we were about to take it, later ones may have been taken and this one's file removed.
            if max(_numbers(self.store)) == number:
                return token
            _remove(self.store, [number])
        raise StorageError(f"{self.store}: somebody else took each of {_ATTEMPTS} tokens first; try again")

    def succession(self) -> Succession:
        """Which commits count now: where nobody has begun, all.

        Raises:
            StorageError: the fence cannot be read.
        """
        for _ in range(_ATTEMPTS):
            numbers = sorted(_numbers(self.store), reverse=True)
            try:
                for number in numbers:
                    counting = _read(self.store, number)["counts"]
                    if counting is not None:
                        return Succession(number, {int(token): step for token, step in counting.items()})
            except NotFoundError:  # a newer holder has begun, and removed it
                continue
            return Succession()
        raise StorageError(f"{self.store} changed {_ATTEMPTS} times while it was read; try again")


def _key(number: int) -> str:
    return f"{number:06d}.json"


def _numbers(store: Store) -> list[int]:
    return [int(found[1]) for key in store.list() if (found := _NAME.fullmatch(key))]


def _newest(store: Store) -> tuple[int, dict[str, Any]]:
    """The newest token, and what it says; `NO_TOKEN` and nothing where there is none."""
    for _ in range(_ATTEMPTS):
        number = max(_numbers(store), default=NO_TOKEN)
        if number == NO_TOKEN:
            return number, {}
        with contextlib.suppress(NotFoundError):  # a newer one has begun, and removed it
            return number, _read(store, number)
    raise StorageError(f"{store} changed {_ATTEMPTS} times while it was read; try again")


def _content(driver: int, counting: Mapping[str, int] | None) -> bytes:
    said = {
        "driver": driver,
        "counts": counting,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.time(),
        "nonce": secrets.token_hex(
            8
        ),  # no two are equal, or two could believe that they had made the same one
    }
    return json.dumps({**said, "digest": _digest(said)}, indent=1, sort_keys=True).encode() + b"\n"


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read(store: Store, number: int) -> dict[str, Any]:
    """What a token says. A damaged one says nothing: its number still holds, and what counted before counts.

    Refusing to go on would make a run unusable for one flipped bit, and only a second holder at that very time
    could do harm.

    Raises:
        NotFoundError: there is none any more.
    """
    try:
        found = json.loads(store.read(_key(number)))
        if isinstance(found, dict) and found.pop("digest", None) == _digest(found):
            return found
    except (CorruptError, ValueError, RecursionError):
        pass
    logger.warning(
        "token %d of %s is damaged; which older commits count is taken from before it", number, store
    )
    return {"driver": number, "counts": None}


def _remove(store: Store, numbers: Iterable[int]) -> None:
    for number in numbers:
        with contextlib.suppress(StorageError):  # left to the next holder
            store.delete(_key(number))


def _superseded(store: Store, newest: int, mine: int) -> SupersededError:
    try:
        said = _read(store, newest)
    except (NotFoundError, StorageError):
        said = {}
    who = f"process {said['pid']} on {said['host']}" if "pid" in said else "another process"
    return SupersededError(
        f"{who} has taken over what {store} guards (token {newest}; this one has {mine}), so nothing more is written "
        "here: see which of the two is to go on, and stop the other"
    )
