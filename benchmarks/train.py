"""Steps per second of a run on shoal beside the same recipe under bare ``torchrun`` DDP, 2 workers each.

``python -m benchmarks.train``, on a machine with nothing else to do. Each pair runs both, in
alternating order, without checkpoints and with one every 2 s (the peer: ``torch.save`` and fsync on rank 0).
One torch thread on both sides; the rate is over the same number of steps after the same warm-up.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import shoal
from benchmarks.cluster import ROOT, own_cluster
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio
from benchmarks.recipes import CASES

GOAL = 0.97
PAIRS = {"digits MLP": 12, "transformer 10M": 6}
"""By case: steps of 2 ms feel whatever else the machine does, so their interval needs more pairs."""
CLUSTER = "version: 1\nname: bench-train\nserve: {port: 0}\ntargets: {local: {cpu: 2}}\n"


def shoal_rate(cluster: shoal.Cluster, case: str, save_every_s: float, **options: Any) -> float:
    """Steps per second of the counted steps, from the run's own journal."""
    recipe_class, warm_up, counted = CASES[case]
    run = cluster.train(
        recipe_class(),
        workers=2,
        steps=warm_up + counted + 1,
        checkpoint_every=save_every_s or 1e6,
        name=f"bench-{time.time_ns()}",
        **options,
    ).wait(progress=False)
    lines = [
        event for event in run.record.events(("metrics",)) if warm_up <= event["step"] <= warm_up + counted
    ]
    return (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["t"] - lines[0]["t"])


def bare_rate(case: str, save_every_s: float, folder: Path) -> float:
    """Steps per second of ``benchmarks.bare_ddp``."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "benchmarks.bare_ddp", case, str(save_every_s),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SHOAL_BENCH_DIR": str(folder),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise SystemExit(f"bare torchrun failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def measure(
    cluster: shoal.Cluster, case: str, save_every_s: float, pairs: int
) -> tuple[list[float], list[float]]:
    """Steps per second of shoal and of bare torchrun, pair by pair."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        for pair in range(pairs):
            for is_ours in (False, True) if pair % 2 else (True, False):
                wait_until_idle()
                if is_ours:
                    ours.append(shoal_rate(cluster, case, save_every_s))
                else:
                    theirs.append(bare_rate(case, save_every_s, Path(folder)))
            print(f"  {case}: shoal {ours[-1]:.1f}, bare {theirs[-1]:.1f} steps/s", flush=True)
    return ours, theirs


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    console = Console(width=100)
    table = Table(title=f"steps/s, shoal / bare torchrun DDP (goal: lower bound at least {GOAL})")
    for column in ("case", "checkpoints", "shoal", "bare", "ratio [95 %]", ""):
        table.add_column(column)
    met = True
    with own_cluster(CLUSTER) as cluster:
        for case in CASES:
            for save_every_s in (0.0, 2.0):
                ours, theirs = measure(cluster, case, save_every_s, PAIRS[case])
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
