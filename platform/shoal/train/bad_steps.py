"""Steps whose gradients cannot be used: which they were, how many may be, and that they stay left out.

A run that goes on from a checkpoint before such a step leaves it out again without trying it: what failed may have
passed, and the weights are to be the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shoal.errors import CorruptError, RecipeError
from shoal.storage import read_json, write_json

OnNan = Literal["fail", "skip", "rollback"]
"""At a NaN or infinite loss: end the run; leave the step's update out; do that from the last checkpoint on."""

FILE = "bad_steps.json"
MAX_BAD_STEPS = 100
"""Of a run; a batch now and then is bad data, and more than that is for a person to look at."""
MAX_IN_A_ROW = 10
"""A model that has diverged gives NaN at every step from there on."""
MAX_SAMPLES = 10_000
"""Sample ids that are kept of one step."""


class BeginAgain(BaseException):
    """Every rank is to begin anew from what is committed. Raised through the recipe's loop, for the engine alone.

    Not an Exception: a loop that catches those must not keep this one.
    """


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """One step that was left out."""

    step: int
    """Counted from 0: steps done before it."""
    reason: str
    samples: list[int]
    """Ids of its batch, the first `MAX_SAMPLES` of them."""


class BadSteps:
    """Those of one run. Every rank holds the same; whoever is told to writes the file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._found: dict[int, BadStep] = {}
        self.is_written = True
        """Whether the file has them all, as far as this process knows."""

    def know(self, found: Iterable[BadStep]) -> None:
        """Those that are recorded already."""
        self._found |= {bad.step: bad for bad in found}

    def add(self, step: int, *, samples: Iterable[int], reason: str) -> BadStep:
        """One more. Repeating it changes nothing.

        Raises:
            RecipeError: these are too many; names them.
        """
        bad = BadStep(step=step, reason=reason, samples=list(samples)[:MAX_SAMPLES])
        self._found[step] = bad
        self.is_written = False
        in_a_row = range(step - MAX_IN_A_ROW, step + 1)
        if len(self._found) > MAX_BAD_STEPS or all(each in self._found for each in in_a_row):
            raise RecipeError(
                f"{reason} at step {step}, and steps {_steps_text(self._found)} were left out before or just now: at "
                f"most {MAX_IN_A_ROW} in a row and {MAX_BAD_STEPS} of a run are. Their samples are in {self._path}. "
                "Lower the learning rate, clip with session.step(max_grad_norm=...), or look at the data"
            )
        return bad

    def write(self) -> None:
        """Replace the file by what is known, in one step; nothing where nothing is known.

        Raises:
            StorageError: it cannot be written.
        """
        if self._found:
            write_json(self._path, [asdict(bad) for _, bad in sorted(self._found.items())])
        self.is_written = True


def read_bad_steps(folder: Path) -> list[BadStep]:
    """Those that are recorded in a run's folder.

    Raises:
        CorruptError: the file is damaged.
        StorageError: it cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return []
    found = read_json(path)
    try:
        if not isinstance(found, list):
            raise TypeError
        return [BadStep(step=int(e["step"]), reason=e["reason"], samples=e["samples"]) for e in found]
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptError(
            f"{path} is damaged: it lists no steps. Restore it from a copy; without it the run would train on "
            "batches that it left out before"
        ) from error


def _steps_text(steps: Iterable[int]) -> str:
    """``3, 8-17``: neighbours as one."""
    spans: list[list[int]] = []
    for step in sorted(steps):
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
