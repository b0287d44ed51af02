"""Puts arena and judge together: plays a scenario, compares it with the undisturbed run, keeps what failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from faults.audit import Left, Shape, check_processes, num_lost, problems
from faults.plan import Scenario, Size

TESTS = Path(__file__).resolve().parents[1]
SHAPE = Shape(steps=12, batch_size=20, num_samples=60)
EVAL_EVERY = 4


@dataclass(frozen=True)
class Verdict:
    """What came of a scenario."""

    scenario: Scenario
    problems: list[str]
    """As sentences; empty when all is as in the undisturbed run."""
    deaths: int
    """Workers that a fault of the plan killed."""
    steps_lost: int
    """Steps that were computed again."""
    seconds: float


class Campaign:
    """An arena of its own, in a process that ends with this; use it in a ``with``. Folders of failures stay."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undisturbed: dict[str, Left] = {}
        self._number = 0

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(TESTS.parent / "platform"), str(TESTS)])
        self._arena = subprocess.Popen(
            [sys.executable, "-m", "faults.arena"],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arena.kill()  # its workers die with it
        self._arena.communicate()

    def size(self, workers: int, shards: int | None) -> Size:
        """How large the undisturbed run is, as `plan` wants to know it."""
        left = self.undisturbed(Scenario("size", workers, shards))
        writes = [said["writes"] for said in left.seen() if "writes" in said and said["rank"] == 0]
        files = left.final(SHAPE.steps).iterdir()
        largest = max(file.stat().st_size for file in files)
        return Size(SHAPE.steps, EVAL_EVERY, writes[-1], largest)

    def undisturbed(self, scenario: Scenario) -> Left:
        """The run that ``scenario`` is compared with; an exact one was trained by one worker."""
        if scenario.kind not in self._undisturbed:
            workers = scenario.workers if scenario.shards is None else 1
            left = self.play(Scenario(f"undisturbed-{scenario.kind}", workers, scenario.shards))
            wrong = problems(left, left, SHAPE)
            assert not wrong, f"without any fault, in {left.folder}: {wrong}"
            self._undisturbed[scenario.kind] = left
        return self._undisturbed[scenario.kind]

    def judge(self, scenario: Scenario) -> Verdict:
        """Play it and say what is wrong. Blocks for a second or two, for `arena.DEADLINE_S` at most."""
        undisturbed = self.undisturbed(scenario)
        left = self.play(scenario)
        played = left.played()
        wrong = problems(left, undisturbed, SHAPE) + check_processes(self._arena.pid)
        verdict = Verdict(
            scenario,
            [f"{problem} (in {left.folder})" for problem in wrong],
            len(played["fired"]),
            num_lost(left.seen()),
            played["seconds"],
        )
        if not wrong:
            shutil.rmtree(left.folder)
        return verdict

    def play(self, scenario: Scenario) -> Left:
        """Let the arena play it; what it left."""
        self._number += 1
        folder = self._folder / f"{self._number:04}-{scenario.kind}-{scenario.workers}-{scenario.name}"
        asked = {"scenario": scenario.as_dict(), "folder": str(folder)}
        stdin: IO[str] = self._arena.stdin  # type: ignore[assignment]
        stdin.write(json.dumps(asked) + "\n")
        stdin.flush()
        self._expect("played")
        return Left(folder)

    def _expect(self, word: str) -> None:
        stdout: IO[str] = self._arena.stdout  # type: ignore[assignment]
        answer = stdout.readline().strip()
        assert answer == word, f"the arena said {answer!r} instead of {word!r}; its own errors are above"
