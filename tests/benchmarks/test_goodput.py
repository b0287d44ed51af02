"""What the goodput benchmark makes of kills: by hand, and on processes that note steps and are started again."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import goodput, victims
from benchmarks.victims import Recovery

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from benchmarks.steps import completed
step = int(sys.argv[3])
while True:
    step += 1
    completed(sys.argv[1], int(sys.argv[2]), step)
    time.sleep(0.001)
"""


def test_steps_that_are_done_again_and_the_way_back_count_for_nothing() -> None:
    cycles = [Recovery(10.0, 25, trained_s=30.0, steps=100), Recovery(0.0, 0, trained_s=40.0, steps=100)]
    assert [goodput.useful_s(cycle) for cycle in cycles] == [22.5, 40.0]
    assert goodput.goodput(cycles) == pytest.approx(62.5 / 80)


def test_the_table_says_what_was_not_met(capsys: pytest.CaptureFixture[str]) -> None:
    def cycle(recovery_s: float) -> list[Recovery]:
        return [Recovery(recovery_s, 0, trained_s=30.0, steps=100)]

    rounds = [{"shoal": cycle(0.3), "stock": cycle(stock_s)} for stock_s in (9.0, 9.5)]
    assert not goodput.print_goodput(rounds, 30.0)
    printed = capsys.readouterr().out
    assert "NOT MET" in printed
    assert "0.990" in printed
    assert goodput.print_goodput([{"shoal": cycle(0.3), "stock": cycle(s)} for s in (40.0, 41.0)], 30.0)


@contextlib.contextmanager
def restarting(folder: Path) -> Iterator[None]:
    """Two ranks, each started again at step 10 whenever it has died."""
    ended = threading.Event()

    def keep(rank: int) -> None:
        first = 0
        while not ended.is_set():
            process = subprocess.Popen(
                [sys.executable, "-c", RANK, str(folder), str(rank), str(first)], cwd=ROOT
            )
            while process.poll() is None and not ended.wait(0.01):
                pass
            process.kill()
            process.wait()
            first = 10

    threads = [threading.Thread(target=keep, args=(rank,)) for rank in victims.RANKS]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)


def test_a_side_is_killed_once_per_stretch_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "SIDES", {"restarting": restarting})
    monkeypatch.setattr(goodput, "wait_until_idle", lambda: None)
    monkeypatch.setattr(victims, "PROGRESS_STEPS", 20)
    cycles = goodput.train_and_kill("restarting", 2, 0.2)
    assert len(cycles) == 2
    assert all(cycle.trained_s >= 0.2 and cycle.seconds > 0 for cycle in cycles)
    assert cycles[0].steps_lost == cycles[0].steps - 10
    assert 0 < goodput.goodput(cycles) < 1
