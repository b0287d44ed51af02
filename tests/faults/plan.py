"""What is done to a run: who dies, where and in which attempt. Drawn from a seed; knows of the run but its size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Point = Literal["begin", "forward", "backward", "sum", "optimizer", "evaluate", "write", "bytes"]
"""Where a process dies; `Fault.at` says when."""

IN_A_STEP: tuple[Point, ...] = ("forward", "backward", "sum", "optimizer")
OFTEN_S, NEVER_S = 0.0, 1e6
"""A checkpoint whenever none is being written, or at evaluations only, which makes the same writes every time."""


@dataclass(frozen=True)
class Size:
    """How large the run is that is disturbed."""

    steps: int
    eval_every: int
    writes: int
    """How often rank 0 creates, renames or removes something on the disk in a run without faults."""
    largest_bytes: int
    """Of the largest file of a checkpoint."""

    @property
    def evaluations(self) -> list[int]:
        """The steps after which the validation data are looked at."""
        return [
            step for step in range(1, self.steps + 1) if step % self.eval_every == 0 or step == self.steps
        ]


@dataclass(frozen=True)
class Fault:
    """One process dies of SIGKILL, or of SIGXFSZ: the kernel's own kill at a byte of a file."""

    rank: int
    point: Point
    at: int = 0
    """The step under way (of ``evaluate`` the steps done); the number of the ``write`` to the disk; how many
    ``bytes`` a file may have. Of ``begin`` nothing."""
    file: str = ""
    """For ``bytes``: what is in the name of the file; empty for any."""

    @property
    def slug(self) -> str:
        """For the name of a folder."""
        return "-".join(filter(None, (self.point, str(self.rank), str(self.at), self.file)))

    def __str__(self) -> str:
        return f"rank {self.rank} {self.point} {self.at}{f' of {self.file}' if self.file else ''}"


@dataclass(frozen=True)
class Attempt:
    """What happens in one attempt: its faults, and who goes on."""

    faults: tuple[Fault, ...]
    then: int | None = None
    """The whole group is killed at the first death, and so many workers start anew; None replaces the dead."""

    def __str__(self) -> str:
        text = " + ".join(map(str, self.faults))
        return text if self.then is None else f"{text}, all die, {self.then} go on"


@dataclass(frozen=True)
class Scenario:
    """A run and what happens to it. After the last attempt nothing does any more."""

    name: str
    workers: int
    shards: int | None
    """None for a fast run."""
    attempts: tuple[Attempt, ...] = ()
    checkpoint_every_s: float = NEVER_S

    @property
    def kind(self) -> str:
        """What its result is compared with: exact runs with each other, fast ones with the same workers."""
        return f"fast-{self.workers}" if self.shards is None else f"exact-{self.shards}"

    def __str__(self) -> str:
        how = "often" if self.checkpoint_every_s == OFTEN_S else "at evaluations"
        said = "; ".join(map(str, self.attempts)) or "undisturbed"
        return f"{self.kind} on {self.workers}, checkpoints {how}: {said}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scenario:
        """What `as_dict` gave."""
        attempts = tuple(
            Attempt(tuple(Fault(**fault) for fault in attempt["faults"]), attempt["then"])
            for attempt in values["attempts"]
        )
        return cls(**{**values, "attempts": attempts})


@dataclass
class Scheduler:
    """Draws scenarios; the same seed draws the same ones in the same order."""

    seed: int
    size: Size
    shards: int = 4
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def one_death(self, *, workers: int, exact: bool, point: Point) -> Scenario:
        """One worker dies once at ``point``, at a time of its own."""
        fault = self.fault(workers, point)
        return self._scenario(workers, exact, [Attempt((fault,))])

    def rescuer_dies(self, *, workers: int, exact: bool) -> Scenario:
        """A worker dies in a step, and another while it commits what the first one's death left it with."""
        first, second = self._random.sample(range(workers), 2)
        killed = Fault(first, self._random.choice(IN_A_STEP), self._random.randrange(1, self.size.steps))
        rescuing = Fault(second, "bytes", self._random.randrange(1, self.size.largest_bytes))
        return self._scenario(workers, exact, [Attempt((killed, rescuing))])

    def sequence(self, *, workers: int, exact: bool, deaths: int) -> Scenario:
        """Several attempts with anything in them; the group of an exact run may die and go on with another number."""
        attempts = []
        size = workers
        for _ in range(deaths):
            faults = [self.fault(size, self._random.choice(get_args(Point)))]
            if size > 1 and self._random.random() < 0.3:
                other = self.fault(size, self._random.choice(get_args(Point)))
                faults += [other] if other.rank != faults[0].rank else []
            then = None
            if exact and self._random.random() < 0.5:
                size = then = self._random.randint(1, self.shards)
            attempts.append(Attempt(tuple(faults), then))
        return self._scenario(workers, exact, attempts)

    def fault(self, workers: int, point: Point) -> Fault:
        """A death of any worker at ``point``; only rank 0 writes while nobody else is lost."""
        rank = 0 if point in ("write", "bytes") else self._random.randrange(workers)
        match point:
            case "begin":
                return Fault(rank, point)
            case "evaluate":
                return Fault(rank, point, self._random.choice(self.size.evaluations))
            case "write":
                return Fault(rank, point, self._random.randrange(self.size.writes))
            case "bytes":
                file = self._random.choice(("", "", "MANIFEST.json", "state.json", "journal.jsonl"))
                return Fault(
                    rank, point, self._random.randrange(400 if file else self.size.largest_bytes), file
                )
        return Fault(rank, point, self._random.randrange(self.size.steps))

    def _scenario(self, workers: int, exact: bool, attempts: list[Attempt]) -> Scenario:
        # Where writes are counted they must be the same ones every time.
        counts = any(fault.point in ("write", "bytes") for attempt in attempts for fault in attempt.faults)
        every_s = NEVER_S if counts else self._random.choice((OFTEN_S, NEVER_S))
        return Scenario(
            f"s{self._random.randrange(16**8):08x}",
            workers,
            self.shards if exact else None,
            tuple(attempts),
            every_s,
        )


def every_death(size: Size, *, workers: int, shards: int | None) -> Iterator[Scenario]:
    """Every rank at every step and point, each in a run of its own."""

    def one(fault: Fault, every_s: float = NEVER_S) -> Scenario:
        return Scenario(fault.slug, workers, shards, (Attempt((fault,)),), every_s)

    for rank in range(workers):
        yield one(Fault(rank, "begin"))
        for step in size.evaluations:
            yield one(Fault(rank, "evaluate", step))
        for step in range(size.steps):
            for point in IN_A_STEP:
                yield one(Fault(rank, point, step), OFTEN_S if step % 2 else NEVER_S)
    for number in range(size.writes):
        yield one(Fault(0, "write", number))


def every_byte(size: Size, *, workers: int, shards: int | None, stride: int) -> Iterator[Scenario]:
    """Rank 0 dies at every ``stride``-th byte of the largest file, and at a quarter of that in the small ones."""
    places = [("", at) for at in range(0, size.largest_bytes, stride)]
    places += [
        (file, at)
        for file in ("MANIFEST.json", "state.json", "journal.jsonl")
        for at in range(1, 600, max(1, stride // 4))
    ]
    for file, at in places:
        fault = Fault(0, "bytes", at, file)
        yield Scenario(fault.slug, workers, shards, (Attempt((fault,)),))
