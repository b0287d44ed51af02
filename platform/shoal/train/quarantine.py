"""Training samples whose loading fails: after some tries others take their places, from that step on and for good.

Others, rather than smaller batches: the sizes of shards, the weights of their gradients and what BatchNorm sees stay
as they are, no rank need know how many another rank has lost, and which one takes a place is a function of the sample
and of those in quarantine alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shoal.errors import CorruptError, RecipeError
from shoal.storage import create_json, read_json
from shoal.train.seeds import derive_seed

FOLDER = "quarantined"
MAX_QUARANTINED = 100
"""Of a run. Also at most a twentieth of the samples, and one in any case: more are a mistake in the data set."""

Key = tuple[int, int]
"""Position in the endless sequence of samples, and the sample's id."""


class BadSample(NamedTuple):
    """One that another takes the place of."""

    sample: int
    step: int
    """From this step on."""
    tries: int
    error: str


class Quarantine:
    """Those of one run, as a rank knows them. ``tell`` is called with each one that this rank finds."""

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, tries: int, tell: Callable[[BadSample], None]
    ) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._tries = tries
        self._tell = tell
        self._limit = max(1, min(MAX_QUARANTINED, num_samples // 20))
        self._since: dict[int, int] = {}
        self.has_news = False
        """Whether this rank found some that the others do not know of yet."""

    @property
    def since(self) -> Mapping[int, int]:
        """By sample, the step from which on another takes its place."""
        return self._since

    def know(self, since: Mapping[int, int]) -> None:
        """Those that are recorded, or that another rank found."""
        for sample, step in since.items():
            self._since[sample] = min(step, self._since.get(sample, step))

    def applied(self, batch: list[Key]) -> list[Key]:
        """The keys with the samples that are to be taken."""
        if not self._since:
            return batch
        return [
            (position, self._instead_of(sample, position // self._batch_size)) for position, sample in batch
        ]

    def load(self, batch: list[Key], *, begin: Callable[[], None], take: Callable[[Key], Any]) -> list[Any]:
        """The samples of a batch that could not be loaded at once; who fails ``tries`` times is replaced.

        Every try is for the whole batch, after ``begin`` has seeded: so what is drawn at random is what a run draws
        that knows of the quarantine from the start.

        Raises:
            RecipeError: too many samples fail; from the last one's error.
        """
        failures: Counter[int] = Counter()
        while True:
            begin()
            samples = []
            for key in self.applied(batch):
                try:
                    samples.append(take(key))
                except Exception as err:
                    failures[key[1]] += 1
                    if failures[key[1]] >= self._tries:
                        self._add(key[1], key[0] // self._batch_size, err)
                    break
            else:
                return samples

    def _add(self, sample: int, step: int, err: Exception) -> None:
        if len(self._since) >= self._limit:
            known = ", ".join(map(str, sorted(self._since)))
            raise RecipeError(
                f"step {step}: the sample {sample} cannot be loaded ({type(err).__name__}: {err}), and neither can "
                f"{known}: of {self._num_samples} samples at most {self._limit} are replaced. Mend the data set"
            ) from err
        self._since[sample] = step
        self.has_news = True
        self._tell(BadSample(sample, step, self._tries, f"{type(err).__name__}: {err}"))

    def _instead_of(self, sample: int, step: int) -> int:
        """The sample itself, or the first of a sequence drawn for it that may be used in that step."""
        taken, number = sample, 0
        while self._since.get(taken, step + 1) <= step:
            number += 1
            taken = derive_seed(self._seed, "instead of", sample, number) % self._num_samples
        return taken


def record_bad_sample(folder: Path, bad: BadSample) -> bool:
    """Note it in a run's folder; False where it is noted already. Any rank may, at any time.

    Raises:
        StorageError: it cannot be written.
    """
    return create_json(folder / FOLDER / f"{bad.sample}.json", bad._asdict())


def read_quarantine(folder: Path) -> dict[int, int]:
    """By sample, the step from which on another takes its place, as recorded in a run's folder.

    Raises:
        CorruptError: a file is damaged.
    """
    since = {}
    for path in sorted((folder / FOLDER).glob("*.json")) if (folder / FOLDER).is_dir() else ():
        found = read_json(path)
        if not isinstance(found, dict) or f"{found.get('sample')}.json" != path.name:
            raise CorruptError(f"{path} is damaged: it names no sample. Restore it from a copy")
        since[int(found["sample"])] = int(found["step"])
    return since
