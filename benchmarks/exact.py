"""What ``exact: true`` costs: steps per second of an exact run beside the same run on the fast path, 2 workers.

``python -m benchmarks.exact [PAIRS]``, on a machine with nothing else to do. Each pair runs both, in alternating
order: the transformer of 10M parameters, in 4 shards (half the promised worst case: two forward passes per
worker where the fast path has one) and in 8.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from benchmarks.cluster import own_cluster
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio
from benchmarks.train import CLUSTER, shoal_rate
from shoal.train.tree import nodes_of, shards_of

CASE = "transformer 10M"
GOALS = {4: 0.8, 8: None}
"""Lower bound for exact / fast, by number of shards."""
WORKERS = 2


def bytes_ratio(num_shards: int, num_workers: int) -> float:
    """Bytes that the busiest rank sends per step, exact / ring all-reduce (see `exchange.TreeSum`)."""
    nodes = [
        len(nodes_of(shards_of(rank, num_workers, num_shards), num_shards)) for rank in range(num_workers)
    ]
    return (max(nodes) + 1) / 2


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    table = Table(title=f"steps/s, exact / fast, {CASE}, {WORKERS} workers")
    for column in ("shards", "exact / fast [95 %]", "bytes sent", "goal", ""):
        table.add_column(column)
    met = True
    with own_cluster(CLUSTER) as cluster:
        for shards, goal in GOALS.items():
            exact, fast = [], []
            for pair in range(pairs):
                for is_exact in (False, True) if pair % 2 else (True, False):
                    wait_until_idle()
                    if is_exact:
                        exact.append(shoal_rate(cluster, CASE, 0.0, exact=True, shards=shards))
                    else:
                        fast.append(shoal_rate(cluster, CASE, 0.0))
                print(f"  {shards} shards: exact {exact[-1]:.2f}, fast {fast[-1]:.2f} steps/s", flush=True)
            ratio = paired_ratio(exact, fast)
            is_met = goal is None or ratio.low >= goal
            met &= is_met
            verdict = "" if goal is None else "met" if is_met else "NOT MET"
            sent = f"{bytes_ratio(shards, WORKERS):.2f} x"
            table.add_row(str(shards), str(ratio), sent, "" if goal is None else str(goal), verdict)
    Console(width=100).print(table)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
