"""Seconds from ``kill -9`` of one of 2 workers to the group's next step, and steps lost: shoal beside its peers.

    python -m benchmarks.recovery [--kills N] [--rounds 3] [--stops 5] [--sides shoal,stock,stock-best,torchrun]

On a machine with nothing else to do. The digits MLP, saved every 2 s on every side; the peers resume as their
documentation shows. ``stock`` is Ray Train as it comes, ``stock-best`` has every setting that helps
(`benchmarks.recovery_sides`). A round starts each side anew and kills rank 0 and rank 1 in turn, each time once the
run has gone on for a while. The interval is over rounds. Then workers of shoal's are stopped (SIGSTOP), not killed.
"""

from __future__ import annotations

import argparse
import math
import signal
import statistics
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

GOALS = {"stock": 8.0, "stock-best": 5.0}
"""Lower bounds for the peer's seconds over shoal's. torchrun is printed for information."""
KILLS = {"shoal": 9, "stock": 3, "stock-best": 3, "torchrun": 3}
"""In all rounds together, by default: what fits into about eight minutes."""
STOP_GOAL_S = 12.0
STOCK_STOP_S = 600
"""Ray Train's default RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S, after which a worker that hangs counts as dead."""

RECOVERY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 60.0
NUM_UNNOTICED = 2
"""After so many stopped workers that nobody replaced, the rest would only take time."""


def kill_workers(side: str, ranks: Sequence[int]) -> list[Recovery | None]:
    """Start the side anew and kill these ranks one after the other; None, and the end, where it did not go on."""
    found: list[Recovery | None] = []
    wait_until_idle()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir="/tmp") as name, SIDES[side](Path(name)):
        victims = Victims(Path(name))
        for rank in ranks:
            victims.wait_for_progress()
            recovery = victims.harm(rank, signal.SIGKILL, RECOVERY_DEADLINE_S)
            found.append(recovery)
            if recovery is None:
                print(f"  {side}, rank {rank} killed: no step in {RECOVERY_DEADLINE_S:g} s", flush=True)
                break
            print(
                f"  {side}, rank {rank} killed: {recovery.seconds:.2f} s, {recovery.steps_lost} step(s) lost",
                flush=True,
            )
    return found


def stop_workers(num_stops: int) -> list[float | None]:
    """Seconds until a stopped worker of shoal's was replaced, each; None where it was not in `STOP_DEADLINE_S`."""
    found: list[float | None] = []
    wait_until_idle()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir="/tmp") as name, SIDES["shoal"](Path(name)):
        victims = Victims(Path(name))
        for number in range(num_stops):
            rank = RANKS[number % len(RANKS)]
            victims.wait_for_progress()
            recovery = victims.harm(rank, signal.SIGSTOP, STOP_DEADLINE_S)
            found.append(None if recovery is None else recovery.seconds)
            if recovery is not None:
                print(f"  shoal, rank {rank} stopped: {recovery.seconds:.2f} s", flush=True)
                continue
            print(f"  shoal, rank {rank} stopped: not replaced in {STOP_DEADLINE_S:g} s; killed", flush=True)
            if victims.harm(rank, signal.SIGKILL, RECOVERY_DEADLINE_S) is None:
                break
            if found.count(None) == NUM_UNNOTICED:
                break
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that at least ``percent`` % of them do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def seconds_by_round(rounds: Sequence[Mapping[str, Sequence[Recovery | None]]], side: str) -> list[float]:
    """One time per round: the geometric mean of that round's recoveries; NaN for a round without any."""
    found = []
    for by_side in rounds:
        seconds = [recovery.seconds for recovery in by_side[side] if recovery is not None]
        found.append(statistics.geometric_mean(seconds) if seconds else math.nan)
    return found


def print_kills(rounds: Sequence[Mapping[str, Sequence[Recovery | None]]]) -> bool:
    """Print the table; whether every goal was met by the sides that took part."""
    table = Table(title="kill -9 of one of 2 workers, digits MLP: seconds to the next step")
    for column in ("", "n", "p50", "p90", "lost p50", "lost most", "side / shoal [95 %]", "goal"):
        table.add_column(column)
    verdicts = []
    for side in rounds[0]:
        recoveries = [recovery for by_side in rounds for recovery in by_side[side]]
        done = [recovery for recovery in recoveries if recovery is not None]
        failed = len(recoveries) - len(done)
        ratio = goal = ""
        is_met = True
        if side == "shoal":
            is_met = not failed and all(recovery.steps_lost == 0 for recovery in done)
            goal = "no step lost"
        elif "shoal" in rounds[0]:
            pairs = [
                (theirs, ours)
                for theirs, ours in zip(
                    seconds_by_round(rounds, side), seconds_by_round(rounds, "shoal"), strict=True
                )
                if not math.isnan(theirs + ours)
            ]
            compared = paired_ratio(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
            ratio = str(compared or "needs 2 rounds")
            if side in GOALS:
                is_met = compared is not None and compared.low >= GOALS[side]
                goal = f"at least {GOALS[side]:g}"
        seconds = [recovery.seconds for recovery in done] or [math.nan]
        lost: list[float] = [recovery.steps_lost for recovery in done] or [math.nan]
        table.add_row(
            side,
            f"{len(done)}" + (f", {failed} failed" if failed else ""),
            f"{percentile(seconds, 50):.2f}",
            f"{percentile(seconds, 90):.2f}",
            f"{percentile(lost, 50):.0f}",
            f"{max(lost):.0f}",
            ratio,
            f"{goal}: {'met' if is_met else 'NOT MET'}" if goal else "",
        )
        verdicts.append(is_met)
    Console(width=100).print(table)
    return all(verdicts)


def print_stops(stops: Sequence[float | None]) -> bool:
    """Print what became of the stopped workers; whether each was replaced soon enough."""
    replaced = [seconds for seconds in stops if seconds is not None]
    is_met = len(replaced) == len(stops) and max(replaced) <= STOP_GOAL_S
    times = f"p50 {percentile(replaced, 50):.2f} s, most {max(replaced):.2f} s; " if replaced else ""
    print(
        f"worker stopped (SIGSTOP), shoal: {times}{len(replaced)} of {len(stops)} replaced "
        f"(goal: all within {STOP_GOAL_S:g} s) {'met' if is_met else 'NOT MET'}\n"
        f"stock Ray Train: {STOCK_STOP_S} s by its default (not measured)"
    )
    return is_met


def main() -> int:
    """Measure, print the tables, and return 1 if a goal is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    by_default = ", ".join(f"{side} {kills}" for side, kills in KILLS.items())
    parser.add_argument(
        "--kills", type=int, help=f"of each side, in all rounds together (default: {by_default})"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3; the ratio needs 2")
    parser.add_argument("--stops", type=int, default=5, help="stopped workers of shoal's (default 5)")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"default {','.join(SIDES)}")
    asked = parser.parse_args()
    sides = asked.sides.split(",")
    if unknown := sorted(set(sides) - set(SIDES)):
        parser.error(f"--sides: {', '.join(unknown)} unknown; there are {', '.join(SIDES)}")
    kills = {side: KILLS[side] if asked.kills is None else asked.kills for side in sides}
    if min(asked.rounds, *kills.values()) < 1 or min(kills.values()) < asked.rounds:
        parser.error(f"--kills {asked.kills}, --rounds {asked.rounds}: each round kills at least once")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up then, too
    rounds: list[dict[str, list[Recovery | None]]] = []
    for number in range(asked.rounds):
        print(f"round {number + 1}", flush=True)
        rounds.append({})
        for side in sides:
            mine = range(kills[side] * number // asked.rounds, kills[side] * (number + 1) // asked.rounds)
            rounds[-1][side] = kill_workers(side, [RANKS[kill % len(RANKS)] for kill in mine])
    met = print_kills(rounds)
    if asked.stops:
        met &= print_stops(stop_workers(asked.stops))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
