"""Steps per second of a run on shoal beside the same recipe under bare ``torchrun`` DDP, 2 workers each.

``python -m benchmarks.train``, on a machine with nothing else to do. Each round starts both anew and lets them
run in alternating slices of seconds (`benchmarks.slices`), the whole cluster being stopped while the peer runs;
without checkpoints and with one every 2 s (the peer: ``torch.save`` and fsync on rank 0). One torch thread on
both sides. The interval is over rounds.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

import shoal
from benchmarks.cluster import ROOT, own_cluster
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio
from benchmarks.recipes import CASES
from benchmarks.slices import Side, alternate, rates_by_round, stopped, wait_for_ticks
from shoal.cluster.processes import find

GOAL = 0.97
ROUNDS = 7
SLICES = {"digits MLP": (1.0, 12), "transformer 10M": (4.0, 4)}
"""How long a slice is, in seconds, and how many pairs a round has."""
SAVE_EVERY_S = 2.0
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


def one_round(cluster: shoal.Cluster, case: str, save_every_s: float) -> list[tuple[float, float]]:
    """Steps per second of shoal and of bare torchrun, pair by pair of slices."""
    slice_s, pairs = SAVE_SLICES if save_every_s else SLICES[case]
    wait_until_idle()
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as name,
        on_shoal(cluster, case, save_every_s, Path(name)) as ours,
        contextlib.ExitStack() as stack,
    ):
        with stopped(ours):
            theirs = stack.enter_context(bare(case, save_every_s, Path(name)))
        return alternate(ours, theirs, slice_s=slice_s, pairs=pairs)


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    console = Console(width=100)
    table = Table(title=f"steps/s, shoal / bare torchrun DDP (goal: lower bound at least {GOAL})")
    for column in ("case", "checkpoints", "shoal", "bare", "ratio [95 %]", ""):
        table.add_column(column)
    met = True
    with own_cluster(CLUSTER) as cluster:
        for case in CASES:
            for save_every_s in (0.0, SAVE_EVERY_S):
                rounds = []
                for _ in range(ROUNDS):
                    rounds.append(one_round(cluster, case, save_every_s))
                    pairs = ", ".join(f"{ours:.4g}/{theirs:.4g}" for ours, theirs in rounds[-1])
                    print(f"  {case}, steps/s shoal/bare: {pairs}", flush=True)
                ours, theirs = rates_by_round(rounds)
                ratio = paired_ratio(ours, theirs)
                met &= ratio.low >= GOAL
                table.add_row(
                    case,
                    f"every {save_every_s:g} s" if save_every_s else "off",
                    f"{statistics.median(ours):.1f}",
                    f"{statistics.median(theirs):.1f}",
                    str(ratio),
                    "met" if ratio.low >= GOAL else "NOT MET",
                )
    console.print(table)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
