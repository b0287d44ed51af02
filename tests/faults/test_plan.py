"""What is drawn from a seed is drawn again, fits the run, and dies where it says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from faults.campaign import TESTS
from faults.plan import Fault, Point, Scenario, Scheduler, Size, every_byte, every_death

SIZE = Size(steps=12, eval_every=5, writes=30, largest_bytes=1000)


def draw(seed: int) -> list[Scenario]:
    scheduler = Scheduler(seed, SIZE)
    deaths = [
        scheduler.one_death(workers=3, exact=True, point=point)
        for point in get_args(Point)
        for _ in range(20)
    ]
    sequences = [scheduler.sequence(workers=2, exact=True, deaths=3) for _ in range(50)]
    return [*deaths, *sequences, *(scheduler.rescuer_dies(workers=3, exact=False) for _ in range(20))]


def test_the_same_seed_draws_the_same_and_another_draws_others() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_what_is_drawn_fits_the_run() -> None:
    for scenario in draw(3):
        size = scenario.workers
        for attempt in scenario.attempts:
            ranks = [fault.rank for fault in attempt.faults]
            assert len(set(ranks)) == len(ranks)
            assert all(0 <= rank < size for rank in ranks)
            assert all(fault.at < max(SIZE.largest_bytes, SIZE.steps + 1) for fault in attempt.faults)
            size = attempt.then or size
            assert 1 <= size <= 4


def test_a_scenario_travels_as_json() -> None:
    for scenario in draw(5):
        assert Scenario.from_dict(json.loads(json.dumps(scenario.as_dict()))) == scenario


def test_every_death_is_every_rank_at_every_step_and_point() -> None:
    faults = {
        fault
        for scenario in every_death(SIZE, workers=2, shards=None)
        for attempt in scenario.attempts
        for fault in attempt.faults
    }
    points = {(fault.point, fault.rank, fault.at) for fault in faults}
    for rank in (0, 1):
        assert {("evaluate", rank, step) for step in (5, 10, 12)} <= points
        assert {
            (point, rank, step) for point in ("forward", "backward", "sum", "optimizer") for step in range(12)
        } <= points
    assert {("write", 0, number) for number in range(30)} <= points
    assert len(points) == 2 * (1 + 3 + 4 * 12) + 30


def test_every_byte_has_the_stride_of_the_large_and_a_finer_one_of_the_small_files() -> None:
    faults = [s.attempts[0].faults[0] for s in every_byte(SIZE, workers=2, shards=None, stride=256)]
    assert [fault.at for fault in faults if not fault.file] == [0, 256, 512, 768]
    assert [fault.at for fault in faults if fault.file == "MANIFEST.json"] == list(range(1, 600, 64))


@pytest.mark.parametrize(
    ("fault", "ends", "there"),
    [
        (Fault(0, "bytes", 300), signal.SIGXFSZ, {"one": 300}),
        (Fault(0, "bytes", 0), signal.SIGXFSZ, {"one": 0}),
        (Fault(0, "bytes", 7, "two"), signal.SIGXFSZ, {"one": 1000, "two": 7}),
        (Fault(0, "write", 0), signal.SIGKILL, {}),
        (
            Fault(0, "write", 2),
            signal.SIGKILL,
            {"one": 1000, "two": 1000},
        ),  # before the third change, a rename
        (Fault(0, "forward", 3), signal.SIGKILL, {"one": 1000, "three": 1000}),
        (Fault(0, "bytes", 1001), 0, {"one": 1000, "three": 1000}),
        (Fault(0, "forward", 4), 0, {"one": 1000, "three": 1000}),
        (None, 0, {"one": 1000, "three": 1000}),
    ],
)
def test_a_process_dies_where_its_fault_says(
    fault: Fault | None, ends: int, there: dict[str, int], tmp_path: Path
) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from faults import inject
from faults.plan import Fault
folder = Path({str(tmp_path)!r})
inject.watch(folder)
inject.arm({fault!r})
for name in ("one", "two"):
    (folder / name).write_bytes(bytes(1000))
(folder / "two").rename(folder / "three")
inject.reach("forward", 3)
assert inject.num_writes() == 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -ends, done.stderr
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == there
