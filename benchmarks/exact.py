"""What ``exact: true`` costs: steps per second of an exact run beside the same run on the fast path, 2 workers.

``python -m benchmarks.exact``, on a machine with nothing else to do. Each round starts both anew on one cluster and
lets their workers run in alternating slices of seconds (`benchmarks.slices`): the transformer of 10M parameters, in
4 shards: two forward passes per worker where the fast path has one.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

import shoal
from benchmarks.cluster import own_cluster
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio
from benchmarks.recipes import CASES
from benchmarks.slices import Side, Slot, alternate, rates_by_round, stopped, wait_for_ticks
from shoal.train.tree import nodes_of, share_of

CASE = "transformer 10M"
SHARDS = 4
GOAL = 0.8
"""Lower bound for exact / fast."""
WORKERS = 2
PASSES = SHARDS // WORKERS
"""Forward passes per step and worker, each of which ticks."""
ROUNDS = 4
SLICE_S, PAIRS = 6.0, 4
CLUSTER = "version: 1\nname: bench-exact\nserve: {port: 0}\ntargets: {local: {cpu: 4}}\n"
"""Room for both, of which one is stopped at any time."""


def bytes_ratio(num_shards: int, num_workers: int) -> float:
    """Bytes that the busiest rank sends per step, exact / ring all-reduce (see `exchange.TreeSum`)."""
    nodes = [
        len(nodes_of(share_of(rank, num_workers, num_shards), num_shards)) for rank in range(num_workers)
    ]
    return (max(nodes) + 1) / 2


@contextlib.contextmanager
def workers_of(cluster: shoal.Cluster, folder: Path, **options: bool | int) -> Iterator[Side]:
    """The workers of a run past its warm-up; it ends with the context."""
    recipe_class, warm_up, steps = CASES[CASE]
    name = f"bench-{time.time_ns()}"
    ticks = folder / name
    run = cluster.train(
        recipe_class(ticks=str(ticks)),
        workers=WORKERS,
        steps=steps,
        checkpoint_every=1e6,
        name=name,
        **options,
    )
    side = Side(lambda: [psutil.Process(pid) for pid in run.pids], ticks)
    try:
        wait_for_ticks(side, PASSES * warm_up)
        yield side
    finally:
        run.stop()
        run.wait(progress=False)


def one_round(cluster: shoal.Cluster) -> list[tuple[float, float]]:
    """Steps per second of the exact run and of the fast one, pair by pair of slices."""
    wait_until_idle()
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as name,
        workers_of(cluster, Path(name), exact=True, shards=SHARDS) as exact,
        contextlib.ExitStack() as stack,
    ):
        with stopped(exact):
            fast = stack.enter_context(workers_of(cluster, Path(name)))
        pairs = alternate([Slot(exact, [fast]), Slot(fast, [exact])], slice_s=SLICE_S, cycles=PAIRS)
    return [(exact_rate / PASSES, fast_rate) for exact_rate, fast_rate in pairs]


def main() -> int:
    """Measure, print the table, and return 1 if a goal is not met."""
    rounds = []
    with own_cluster(CLUSTER) as cluster:
        for _ in range(ROUNDS):
            rounds.append(one_round(cluster))
            pairs = ", ".join(f"{exact:.3g}/{fast:.3g}" for exact, fast in rounds[-1])
            print(f"  steps/s exact/fast: {pairs}", flush=True)
    ratio = paired_ratio(*rates_by_round(rounds))
    print(f"steps/s, exact in {SHARDS} shards / fast, {CASE}, {WORKERS} workers: {ratio}")
    print(f"bytes sent by the busiest rank: {bytes_ratio(SHARDS, WORKERS):.2f} x those of a ring all-reduce")
    print(f"goal: lower bound at least {GOAL}: {'met' if ratio.low >= GOAL else 'NOT MET'}")
    return 0 if ratio.low >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
