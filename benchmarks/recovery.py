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
from benchmarks.ratios import Ratio, paired_ratio
from benchmarks.recovery_sides import SIDES
from benchmarks.victims import RANKS, Recovery, Victims

GOALS = {"stock": 8.0, "stock-best": 5.0}
"""Lower bounds for the peer's seconds over shoal's. torchrun is printed for information."""
KILLS = {"shoal": 6, "stock": 3, "stock-best": 3, "torchrun": 3}
"""In all rounds together, by default: what fits into about eight minutes."""
STOP_GOAL_S = 12.0
STOCK_STOP_S = 600
"""Ray Train's default RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S, after which a worker that hangs counts as dead."""

RECOVERY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 60.0
NUM_UNNOTICED = 2
"""After so many stopped workers that nobody replaced, the rest would only take time."""

Rounds = Sequence[Mapping[str, Sequence[Recovery | None]]]
"""What the kills of each round cost, by side; None where a side did not go on."""


def harm_workers(side: str, ranks: Sequence[int], number: int, deadline_s: float) -> list[Recovery | None]:
    """Start the side anew and send these ranks a signal, one after the other; what each cost.

    None for a rank that was not replaced within ``deadline_s``; the list then ends, unless a worker that was stopped
    can be killed instead.
    """
    found: list[Recovery | None] = []
    wait_until_idle()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir="/tmp") as name, SIDES[side](Path(name)):
        victims = Victims(Path(name))
        for rank in ranks:
            victims.wait_for_progress()
            recovery = victims.harm(rank, number, deadline_s)
            found.append(recovery)
            told = f"no step in {deadline_s:g} s" if recovery is None else str(recovery)
            print(f"  {side}, {signal.Signals(number).name} to rank {rank}: {told}", flush=True)
            if recovery is None and (
                number == signal.SIGKILL
                or found.count(None) == NUM_UNNOTICED
                or victims.harm(rank, signal.SIGKILL, RECOVERY_DEADLINE_S) is None
            ):
                break
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that at least ``percent`` % of them do not exceed; NaN for none."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1] if values else math.nan


def compare(rounds: Rounds, side: str) -> Ratio | None:
    """A peer's seconds over shoal's, by round; None unless both went on in two rounds or more."""
    pairs = []
    for by_side in rounds:
        theirs, ours = ([one.seconds for one in by_side[each] if one is not None] for each in (side, "shoal"))
        if theirs and ours:
            pairs.append((statistics.geometric_mean(theirs), statistics.geometric_mean(ours)))
    return paired_ratio(*zip(*pairs, strict=True)) if len(pairs) > 1 else None


def print_kills(rounds: Rounds) -> bool:
    """Print the table; whether every goal was met by the sides that took part."""
    table = Table(
        title=f"kill -9 of one of 2 workers, digits MLP, {len(rounds)} round(s): seconds to the next step"
    )
    for column in ("", "n", "p50", "p90", "steps lost", "/ shoal [95 %]", "goal"):
        table.add_column(column, no_wrap=True)
    verdicts = []
    for side in rounds[0]:
        recoveries = [recovery for by_side in rounds for recovery in by_side[side]]
        done = [recovery for recovery in recoveries if recovery is not None]
        lost = [recovery.steps_lost for recovery in done]
        ratio = compare(rounds, side) if "shoal" in rounds[0] and side != "shoal" else None
        goal = ""
        if side == "shoal":
            verdicts.append(None not in recoveries and not any(lost))
            goal = f"no step lost: {'met' if verdicts[-1] else 'NOT MET'}"
        elif "shoal" in rounds[0] and side in GOALS:
            verdicts.append(ratio is not None and ratio.low >= GOALS[side])
            goal = f"{GOALS[side]:g} or more: {'met' if verdicts[-1] else 'NOT MET'}"
        table.add_row(
            side,
            str(len(done)) if len(done) == len(recoveries) else f"{len(done)} of {len(recoveries)}",
            f"{percentile([recovery.seconds for recovery in done], 50):.2f}",
            f"{percentile([recovery.seconds for recovery in done], 90):.2f}",
            f"p50 {percentile(lost, 50):.0f}, max {percentile(lost, 100):.0f}",
            "" if ratio is None else f"{ratio.mean:.1f} [{ratio.low:.1f}, {ratio.high:.1f}]",
            goal,
        )
    Console(width=100).print(table)
    return all(verdicts)


def print_stops(stops: Sequence[Recovery | None]) -> bool:
    """Print what became of the stopped workers; whether each was replaced soon enough."""
    seconds = [recovery.seconds for recovery in stops if recovery is not None]
    is_met = len(seconds) == len(stops) and max(seconds) <= STOP_GOAL_S
    times = f"p50 {percentile(seconds, 50):.2f} s, most {max(seconds):.2f} s; " if seconds else ""
    print(
        f"worker stopped (SIGSTOP), shoal: {times}{len(seconds)} of {len(stops)} replaced "
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
            ranks = [RANKS[kill % len(RANKS)] for kill in mine]
            rounds[-1][side] = harm_workers(side, ranks, signal.SIGKILL, RECOVERY_DEADLINE_S)
    met = print_kills(rounds)
    if asked.stops:
        ranks = [RANKS[stop % len(RANKS)] for stop in range(asked.stops)]
        met &= print_stops(harm_workers("shoal", ranks, signal.SIGSTOP, STOP_DEADLINE_S))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
