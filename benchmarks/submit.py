"""Submit to first step: shoal's edge beside stock Ray Train, paired and interleaved on one cluster.

Run it on a cluster that `shoal up` started, on a machine with nothing else to do, from the repository:
``eval $(shoal env); python -m benchmarks.submit [pairs]``. Both sides use that cluster. Each pair runs both
in random order; between runs it waits until the machine is idle, so that neither pays for processes that the
other left starting. The first step is the first finished all-reduce of two workers.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio

WORKERS = 2
GOAL = 0.7


def first_step(config: dict[str, Any]) -> None:
    """Do one all-reduce and write down when it was done."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        Path(config["out"]).write_text(json.dumps(time.time()))


def run_stock(folder: Path, out: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        first_step,
        train_loop_config={"out": str(out)},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(name=out.stem, storage_path=str(folder)),
    ).fit()


def run_shoal(folder: Path, out: Path) -> None:
    from shoal.config import Range
    from shoal.train.workers import Workers

    Workers(
        first_step,
        {"out": str(out)},
        name=out.stem,
        workers=Range(WORKERS, WORKERS),
        resources_per_worker={"CPU": 1},
        max_failures=0,
        storage_path=folder,
    ).run()


def timed(run: Callable[[Path, Path], None], folder: Path, label: str) -> float:
    """Seconds from submit to the end of the first all-reduce, on a machine that was idle before."""
    wait_until_idle()
    out = folder / f"{label}.json"  # stock makes a folder of the name alone
    start = time.time()
    run(folder, out)
    return float(json.loads(out.read_text())) - start


def measure(pairs: int) -> dict[str, list[float]]:
    """Seconds of ``pairs`` pairs on the attached cluster, by side."""
    order = random.Random(0)
    times: dict[str, list[float]] = {"shoal": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="shoal-submit-") as name:
        folder = Path(name)
        for warm_up in (run_shoal, run_stock):  # the first of each starts actors that stay
            timed(warm_up, folder, f"{warm_up.__name__}-first")
        for number in range(pairs):
            sides = [("shoal", run_shoal), ("stock", run_stock)]
            order.shuffle(sides)
            for side, run in sides:
                times[side].append(timed(run, folder, f"{side}-{number}"))
            print(
                f"pair {number + 1}: " + ", ".join(f"{side} {t[-1]:.2f} s" for side, t in times.items()),
                flush=True,
            )
    return times


def main() -> int:
    """Print the table; 0 when the goal is met."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    if not os.environ.get("RAY_ADDRESS"):
        print("attach first: eval $(shoal env), then run again", file=sys.stderr)
        return 2
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    times = measure(pairs)
    ratio = paired_ratio(times["shoal"], times["stock"])
    print(
        f"submit to first step, shoal / stock Ray Train: {ratio} (goal: at most {GOAL}); "
        f"median {statistics.median(times['shoal']):.2f} s / {statistics.median(times['stock']):.2f} s"
    )
    return 0 if ratio.high <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
