"""Steps per second of a run on shoal beside the same recipe under bare ``torchrun`` DDP, 2 workers each.

    python -m benchmarks.train [--rounds 7] [--cases "digits MLP,transformer 10M"] [--saves off,on]

On a machine with nothing else to do. Each round starts both anew and lets them
run in alternating slices of seconds (`benchmarks.slices`); without checkpoints and with one every 2 s (the peer:
``torch.save`` and fsync on rank 0). One torch thread on both sides. The interval is over rounds.

The peer runs twice: *alone*, the whole cluster being stopped, which is what a person who has no cluster gets and what
the goal is about; and *beside* an idle cluster, to tell what the run itself costs from what Ray's processes do. The
ratio of these two is the most that any run on that cluster could reach.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

import shoal
from benchmarks.cluster import ROOT, own_cluster
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio
from benchmarks.recipes import CASES
from benchmarks.slices import Side, Slot, alternate, rates_by_round, stopped, wait_for_ticks
from shoal.cluster.processes import find

GOAL = 0.97
SLICES = {"digits MLP": (1.0, 10), "transformer 10M": (4.0, 4)}
"""How long a slice is, in seconds, and how many of each kind a round has."""
SAVES = {"off": 0.0, "on": 2.0}
"""Seconds between two checkpoints; 0 for none."""
SAVE_SLICES = (5.0, 3)
"""The same with checkpoints: every slice has two."""
CLUSTER = "version: 1\nname: bench-train\nserve: {port: 0}\ntargets: {local: {cpu: 2}}\n"


@contextlib.contextmanager
def on_shoal(cluster: shoal.Cluster, case: str, save_every_s: float, folder: Path) -> Iterator[Side]:
    """A run past its warm-up, with all processes of its cluster; it ends with the context."""
    recipe_class, warm_up, steps = CASES[case]
    side = Side(lambda: find(cluster.info.cluster_id), folder / "shoal")
    run = cluster.train(
        recipe_class(ticks=str(side.ticks)),
        workers=2,
        steps=steps,
        checkpoint_every=save_every_s or 1e6,
        name=f"bench-{time.time_ns()}",
    )
    try:
        wait_for_ticks(side, warm_up)
        yield side
    finally:
        run.stop()
        run.wait(progress=False)


@contextlib.contextmanager
def bare(case: str, save_every_s: float, folder: Path) -> Iterator[Side]:
    """``benchmarks.bare_ddp`` under ``torchrun``, past its warm-up; it is killed with the context."""
    side_ticks = folder / "bare"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "benchmarks.bare_ddp", case, str(save_every_s), str(side_ticks),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    with open(folder / "bare.log", "w") as log:
        launched = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    side = Side(lambda: [launched, *launched.children(recursive=True)], side_ticks)
    try:
        wait_for_ticks(side, CASES[case][1])
        yield side
    finally:
        for process in side.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launched.wait()


def processes_of_run(cluster: shoal.Cluster) -> list[psutil.Process]:
    """Workers and controllers of the cluster's run: what is not there while the cluster is idle."""
    found = []
    for process in find(cluster.info.cluster_id):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()[:1]).startswith(("ray::_Controller", "ray::_Worker")):
                found.append(process)
    return found


def one_round(cluster: shoal.Cluster, case: str, save_every_s: float) -> list[tuple[float, ...]]:
    """Steps per second of shoal, of bare torchrun alone and of it beside the idle cluster, cycle by cycle."""
    slice_s, cycles = SAVE_SLICES if save_every_s else SLICES[case]
    wait_until_idle()
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as name,
        on_shoal(cluster, case, save_every_s, Path(name)) as ours,
        contextlib.ExitStack() as stack,
    ):
        with stopped(ours):
            theirs = stack.enter_context(bare(case, save_every_s, Path(name)))
        run = Side(lambda: processes_of_run(cluster), ours.ticks)
        return alternate(
            [Slot(ours, [theirs]), Slot(theirs, [ours]), Slot(theirs, [run])],
            slice_s=slice_s,
            cycles=cycles,
        )


def choices(option: str, text: str, known: Iterable[str], parser: argparse.ArgumentParser) -> list[str]:
    """The names in a comma-separated option, in its order."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"{option}: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    return names


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="default 7, half an hour; an interval needs 2")
    parser.add_argument("--cases", default=",".join(CASES), help=f'default "{",".join(CASES)}"')
    parser.add_argument("--saves", default=",".join(SAVES), help=f"default {','.join(SAVES)}")
    asked = parser.parse_args()
    cases = choices("--cases", asked.cases, CASES, parser)
    saves = choices("--saves", asked.saves, SAVES, parser)
    if asked.rounds < 2:
        parser.error(f"--rounds {asked.rounds}: an interval needs 2 or more")
    console = Console(width=100)
    table = Table(
        title=f"steps/s, shoal / bare torchrun DDP (goal: lower bound of the first at least {GOAL})"
    )
    for column in ("case", "saves", "shoal / alone [95 %]", "", "shoal / beside [95 %]"):
        table.add_column(column)
    met = True
    with own_cluster(CLUSTER) as cluster:
        for case in cases:
            for save_every_s in (SAVES[name] for name in saves):
                rounds = []
                for _ in range(asked.rounds):
                    rounds.append(one_round(cluster, case, save_every_s))
                    cycles = ", ".join("/".join(f"{rate:.4g}" for rate in cycle) for cycle in rounds[-1])
                    print(f"  {case}, steps/s shoal/alone/beside: {cycles}", flush=True)
                ours, alone, beside = rates_by_round(rounds)
                print(
                    f"  what no run on a cluster can win back, beside / alone: {paired_ratio(beside, alone)}"
                )
                ratio = paired_ratio(ours, alone)
                met &= ratio.low >= GOAL
                table.add_row(
                    case,
                    f"{save_every_s:g} s" if save_every_s else "off",
                    str(ratio),
                    "met" if ratio.low >= GOAL else "NOT MET",
                    str(paired_ratio(ours, beside)),
                )
    console.print(table)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
