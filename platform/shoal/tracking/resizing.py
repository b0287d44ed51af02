"""How many workers a run should have, from any process: a wish to its driver, an order from that to its workers.

Two small files in the run's folder, beside the stop mark. The wish is there while a driver that can resize the run
has it, or was killed with it; an order names the attempt that it is meant for, so that none outlives it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import Range
from shoal.errors import CorruptError, EnvironmentFailure, NotFoundError, RequestError
from shoal.storage import read_json, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a driver makes true when there is room."""

    workers: Range
    most: int
    """The run can never have more: its shards, or the samples of its batch."""
    per_worker: Mapping[str, float]
    """Ray resources that each worker holds."""

    @property
    def reachable(self) -> Range:
        """``workers`` without those beyond ``most``; a least that is beyond it stays, for the session to refuse."""
        return Range(self.workers.min, max(self.workers.min, min(self.workers.max, self.most)))


class Resizing:
    """The two files of the run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._wish_path = folder / "workers.json"
        self._order_path = folder / "resize.json"

    def begin(self, wish: Wish | None) -> None:
        """A driver begins: what was wished of the one before it is forgotten. ``None``: it cannot resize the run.

        Raises:
            StorageError: it cannot be written.
        """
        self.withdraw()
        if wish is None:
            self._wish_path.unlink(missing_ok=True)
        else:
            self._write(wish)

    def wish(self) -> Wish | None:
        """What is wished of the last driver; ``None`` where there was none, or one that cannot resize the run.

        Raises:
            CorruptError: the file is damaged.
            StorageError: it cannot be read.
        """
        try:
            found = read_json(self._wish_path)
        except NotFoundError:
            return None
        try:
            wish = Wish(
                workers=Range.parse(found["workers"]),
                most=_count(found["most"]),
                per_worker={str(name): float(amount) for name, amount in found["per_worker"].items()},
            )
            _count(wish.workers.min)
        except (KeyError, TypeError, ValueError, AttributeError, RequestError) as error:
            raise CorruptError(
                f"{self._wish_path} is damaged: it does not say how many workers. Stop the run and start it again"
            ) from error
        return wish

    def ask(self, wish: Wish) -> None:
        """Replace the wish; the driver looks now and then. Of several that ask at once, the last one gets its way.

        Raises:
            StorageError: it cannot be written.
        """
        self._write(wish)

    def order(self, attempt: int, workers: int) -> None:
        """Have the workers of ``attempt`` commit and end at their next step boundary, for ``workers`` to go on.

        Raises:
            StorageError: it cannot be written.
        """
        write_json(self._order_path, {"attempt": attempt, "workers": workers})

    def withdraw(self) -> None:
        """Take an order back that has not been followed yet."""
        self._order_path.unlink(missing_ok=True)

    def ordered(self, attempt: int) -> int | None:
        """How many workers are to go on from ``attempt``'s next step boundary; ``None`` if it is to go on itself."""
        try:
            found = read_json(self._order_path)
            if _count(found["attempt"]) == attempt:
                return _count(found["workers"])
        except NotFoundError:
            return None
        except (EnvironmentFailure, KeyError, TypeError, ValueError) as error:
            logger.warning("%s cannot be read and is not followed: %r", self._order_path, error)
        return None

    def _write(self, wish: Wish) -> None:
        write_json(
            self._wish_path,
            {"workers": str(wish.workers), "most": wish.most, "per_worker": dict(wish.per_worker)},
        )


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no number of anything")
    return value
