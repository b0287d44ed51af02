"""Goodput with one ``kill -9`` per 30 s of training: seconds of steps that count over all, shoal beside stock Ray.

    python -m benchmarks.goodput [--rounds 3] [--kills 2] [--every 30] [--sides shoal,stock,stock-best]

On a machine with nothing else to do. The sides are those of `benchmarks.recovery`: the digits MLP on 2 workers,
saved every 2 s, going on as each one's documentation shows (Ray Train: ``FailureConfig(max_failures=-1)``,
``report`` with a checkpoint, ``get_checkpoint``); ``stock`` is Ray Train as it comes, ``stock-best`` has every
setting that helps.

A round starts each side anew and kills rank 0 and rank 1 in turn, each time after ``--every`` seconds of training.
It is measured from outside, the same way on every side: from the first step to the kill the run trains; of that,
what the steps took that had to be done again counts for nothing (by their share of the steps); from the kill to the
first step afterwards nothing counts. Checkpoints are part of training on every side, the first start is not. The
interval is over rounds.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio
from benchmarks.recovery_sides import SIDES
from benchmarks.victims import RANKS, Recovery, Victims

GOAL = 2.0
"""Lower bound for shoal's goodput over stock Ray Train's."""
PEERS = ("stock", "stock-best")
RECOVERY_DEADLINE_S = 120.0

Cycles = Sequence[Recovery]
"""Training, kill and recovery, one after the other."""


def useful_s(cycle: Recovery) -> float:
    """Seconds of the training before the kill whose steps were not done again."""
    return cycle.trained_s * (1 - min(1.0, cycle.steps_lost / cycle.steps))


def goodput(cycles: Cycles) -> float:
    """Useful seconds over all seconds, of cycles that follow each other."""
    return sum(map(useful_s, cycles)) / sum(cycle.trained_s + cycle.seconds for cycle in cycles)


def train_and_kill(side: str, num_kills: int, every_s: float) -> list[Recovery]:
    """Start the side anew and kill one of its workers after every ``every_s`` seconds of training.

    Raises:
        SystemExit: it did not go on within `RECOVERY_DEADLINE_S`.
    """
    wait_until_idle()
    found: list[Recovery] = []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir="/tmp") as name, SIDES[side](Path(name)):
        victims = Victims(Path(name), progress_s=every_s)
        for kill in range(num_kills):
            victims.wait_for_progress()
            cycle = victims.harm(RANKS[kill % len(RANKS)], signal.SIGKILL, RECOVERY_DEADLINE_S)
            if cycle is None:
                raise SystemExit(f"{side}: no step in {RECOVERY_DEADLINE_S:g} s after a kill")
            found.append(cycle)
            print(f"  {side}: {cycle.trained_s:.1f} s of training, then {cycle}", flush=True)
    return found


def print_goodput(rounds: Sequence[Mapping[str, Cycles]], every_s: float) -> bool:
    """Print the table; whether the goal was met against every peer that took part."""
    table = Table(
        title=f"one kill -9 per {every_s:g} s of training, digits MLP, 2 workers, {len(rounds)} round(s)"
    )
    for column in ("", "kills", "goodput", "by round", "shoal / it [95 %]", "goal"):
        table.add_column(column, no_wrap=True)
    verdicts = []
    for side in rounds[0]:
        by_round = [goodput(by_side[side]) for by_side in rounds]
        ratio, goal = "", ""
        if side in PEERS and "shoal" in rounds[0] and len(rounds) > 1:
            found = paired_ratio([goodput(by_side["shoal"]) for by_side in rounds], by_round)
            verdicts.append(found.low >= GOAL)
            ratio = f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
            goal = f"{GOAL:g} or more: {'met' if verdicts[-1] else 'NOT MET'}"
        table.add_row(
            side,
            str(sum(len(by_side[side]) for by_side in rounds)),
            f"{goodput([cycle for by_side in rounds for cycle in by_side[side]]):.3f}",
            f"{min(by_round):.3f} to {max(by_round):.3f}",
            ratio,
            goal,
        )
    Console(width=100).print(table)
    return all(verdicts)


def main() -> int:
    """Measure and print; the exit status says whether the goals were met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="times that each side is started (default 3)")
    parser.add_argument("--kills", type=int, default=2, help="per side and round (default 2)")
    parser.add_argument(
        "--every", type=float, default=30.0, help="seconds of training before a kill (default 30)"
    )
    sides_of_default = ("shoal", *PEERS)
    parser.add_argument(
        "--sides", default=",".join(sides_of_default), help=f"default {','.join(sides_of_default)}"
    )
    asked = parser.parse_args()
    sides = asked.sides.split(",")
    if unknown := sorted(set(sides) - set(SIDES)):
        parser.error(f"--sides: {', '.join(unknown)} unknown; there are {', '.join(SIDES)}")
    if asked.rounds < 1 or asked.kills < 1 or asked.every <= 0:
        parser.error("--rounds, --kills and --every are above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up then, too
    rounds = []
    for number in range(asked.rounds):
        print(f"round {number + 1}", flush=True)
        rounds.append({side: train_and_kill(side, asked.kills, asked.every) for side in sides})
    return 0 if print_goodput(rounds, asked.every) else 1


if __name__ == "__main__":
    sys.exit(main())
