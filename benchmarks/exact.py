"""What ``exact: true`` costs: steps per second of an exact run beside the same run on the fast path, 2 workers.

``python -m benchmarks.exact [PAIRS]``, on a machine with nothing else to do. Each pair runs both, in alternating
order: the transformer of 10M parameters, in 4 shards: two forward passes per worker where the fast path has one.
"""

from __future__ import annotations

import sys

from benchmarks.cluster import own_cluster
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio
from benchmarks.train import CLUSTER, shoal_rate
from shoal.train.tree import nodes_of, share_of

CASE = "transformer 10M"
SHARDS = 4
GOAL = 0.8
"""Lower bound for exact / fast."""
WORKERS = 2


def bytes_ratio(num_shards: int, num_workers: int) -> float:
    """Bytes that the busiest rank sends per step, exact / ring all-reduce (see `exchange.TreeSum`)."""
    nodes = [
        len(nodes_of(share_of(rank, num_workers, num_shards), num_shards)) for rank in range(num_workers)
    ]
    return (max(nodes) + 1) / 2


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    exact, fast = [], []
    with own_cluster(CLUSTER) as cluster:
        for pair in range(pairs):
            for is_exact in (False, True) if pair % 2 else (True, False):
                wait_until_idle()
                if is_exact:
                    exact.append(shoal_rate(cluster, CASE, 0.0, exact=True, shards=SHARDS))
                else:
                    fast.append(shoal_rate(cluster, CASE, 0.0))
            print(f"  exact {exact[-1]:.2f}, fast {fast[-1]:.2f} steps/s", flush=True)
    ratio = paired_ratio(exact, fast)
    print(f"steps/s, exact in {SHARDS} shards / fast, {CASE}, {WORKERS} workers: {ratio}")
    print(f"bytes sent by the busiest rank: {bytes_ratio(SHARDS, WORKERS):.2f} x those of a ring all-reduce")
    print(f"goal: lower bound at least {GOAL}: {'met' if ratio.low >= GOAL else 'NOT MET'}")
    return 0 if ratio.low >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
