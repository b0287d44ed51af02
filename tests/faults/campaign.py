"""Puts arena and judge together: plays a scenario, compares it with the undisturbed run, keeps what failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from faults.audit import Left, Shape, check_processes, num_lost, problems
from faults.plan import Scenario, Size

TESTS = Path(__file__).resolve().parents[1]
SHAPE = Shape(steps=12, batch_size=20, num_samples=60)
EVAL_EVERY = 4
AT_ONCE = 8
"""Scenarios that are played at the same time; most of what they do is wait."""
PATIENCE_S = 150.0
"""More than the arena's own deadline for a scenario."""


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
        self._over: dict[str, threading.Event] = {}
        self._asking, self._comparing = threading.Lock(), threading.Lock()

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(TESTS.parent / "platform"), str(TESTS)])
        self._arena = subprocess.Popen(
            [sys.executable, "-m", "faults.arena"],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = self._stdout.readline().strip()
        assert answer == "ready", f"the arena said {answer!r}; its own errors are above"
        threading.Thread(target=self._listen, name="arena", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arena.kill()  # its workers die with it
        self._arena.wait()

    def size(self, workers: int, shards: int | None) -> Size:
        """How large the undisturbed run is, as `plan` wants to know it."""
        left = self.undisturbed(Scenario("size", workers, shards))
        writes = [said["writes"] for said in left.seen() if "writes" in said and said["rank"] == 0]
        files = left.final(SHAPE.steps).iterdir()
        largest = max(file.stat().st_size for file in files)
        return Size(SHAPE.steps, EVAL_EVERY, writes[-1], largest)

    def undisturbed(self, scenario: Scenario) -> Left:
        """The run that ``scenario`` is compared with; an exact one was trained by one worker."""
        with self._comparing:
            if scenario.kind not in self._undisturbed:
                workers = scenario.workers if scenario.shards is None else 1
                left = self.play(Scenario(f"undisturbed-{scenario.kind}", workers, scenario.shards))
                wrong = problems(left, left, SHAPE)
                assert not wrong, f"without any fault, in {left.folder}: {wrong}"
                self._undisturbed[scenario.kind] = left
            return self._undisturbed[scenario.kind]

    def judge_all(self, scenarios: Iterable[Scenario]) -> Iterator[Verdict]:
        """The verdict on each, as they are over; `AT_ONCE` are played at the same time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in as_completed([pool.submit(self.judge, scenario) for scenario in scenarios]):
                yield done.result()

    def judge(self, scenario: Scenario) -> Verdict:
        """Play it and say what is wrong. Blocks for some seconds, for `PATIENCE_S` at most."""
        undisturbed = self.undisturbed(scenario)
        left = self.play(scenario)
        played = left.played()
        wrong = problems(left, undisturbed, SHAPE) + check_processes(played["group"])
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
        over = threading.Event()
        with self._asking:
            self._number += 1
            folder = self._folder / f"{self._number:04}-{scenario.kind}-{scenario.workers}-{scenario.name}"
            self._over[str(folder)] = over
            self._stdin.write(json.dumps({"scenario": scenario.as_dict(), "folder": str(folder)}) + "\n")
            self._stdin.flush()
        assert over.wait(PATIENCE_S), (
            f"the arena has not ended {scenario} after {PATIENCE_S:g} s, see {folder}"
        )
        return Left(folder)

    @property
    def _stdin(self) -> IO[str]:
        assert self._arena.stdin is not None
        return self._arena.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self._arena.stdout is not None
        return self._arena.stdout

    def _listen(self) -> None:
        for line in self._stdout:
            self._over[line.strip()].set()
