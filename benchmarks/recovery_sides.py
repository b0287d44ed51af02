"""Starts what `benchmarks.recovery` kills: the digits MLP on 2 workers, on shoal and on its peers.

Each side is a context manager that takes an empty folder, where its ranks note their steps (`benchmarks.steps`).
Everything that it started is gone when it ends. What listens, listens on loopback.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.cluster import ROOT, own_cluster
from benchmarks.recipes import SAVE_EVERY_S, CountedDigits
from benchmarks.victims import LOG
from shoal.cluster import processes

MANY = 1_000_000
"""Steps, or restarts: more than any side comes to."""
STOP_DEADLINE_S = 30.0

CLUSTER = (
    f"version: 1\nname: bench-recovery\ntrain: {{retries: {MANY}}}\n"
    "serve: {port: 0}\ntargets: {local: {cpu: 4}}\n"
)

BEST_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less to start
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",  # and another
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",  # 30 s
    "RAY_preload_python_modules": "torch,ray.train.torch",
    "RAY_worker_maximum_startup_concurrency": "8",  # the number of CPUs
    "RAY_worker_niceness": "0",  # 15
}
"""Every setting of Ray 2.60 that shortens a recovery, read in its constants; its pages name none. Where a comment
has a number, that is the default. Not among them: torchft, another library with a server of its own, in alpha."""


@contextlib.contextmanager
def on_shoal(folder: Path) -> Iterator[None]:
    """A cluster of its own, as `shoal up` starts it, and a run on it."""
    with own_cluster(CLUSTER) as cluster:
        run = cluster.train(
            CountedDigits(folder=str(folder)),
            workers=2,
            steps=MANY,
            checkpoint_every=SAVE_EVERY_S,
            name="recovery",
        )
        try:
            yield
        finally:
            run.abort()


def on_stock_ray(folder: Path, settings: Mapping[str, str]) -> AbstractContextManager[None]:
    """A Ray cluster of its own and a run of Ray Train's on it."""
    return _peer(["-m", "benchmarks.recovery_peers", "ray", str(folder)], folder, settings)


def on_torchrun(folder: Path) -> AbstractContextManager[None]:
    """torch's launcher, which looks at its processes every 0.1 s by default."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={MANY}"]
    return _peer([*launcher, "-m", "benchmarks.recovery_peers", "torchrun", str(folder)], folder, {})


SIDES: dict[str, Callable[[Path], AbstractContextManager[None]]] = {
    "shoal": on_shoal,
    "stock": lambda folder: on_stock_ray(folder, {}),
    "stock-best": lambda folder: on_stock_ray(folder, BEST_SETTINGS),
    "torchrun": on_torchrun,
}


@contextlib.contextmanager
def _peer(arguments: Sequence[str], folder: Path, settings: Mapping[str, str]) -> Iterator[None]:
    """A Python process, and all that it starts: known by a mark in the environment, as a cluster's are."""
    mark = secrets.token_hex(8)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SHOAL_"))}
    environment |= {
        processes.CLUSTER_ID: mark,
        "SPT_NOENV": "1",  # else Ray overwrites the mark with a process's title
        "TMPDIR": str(folder),  # what a killed process cannot remove goes with the folder
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        **settings,
    }
    with open(folder / LOG, "w") as log:
        launched = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us; it ends with the context
        )
    try:
        yield
    finally:
        left = processes.stop(mark, grace_s=2.0, deadline_s=STOP_DEADLINE_S)
        if left:
            print(f"  still there after {STOP_DEADLINE_S:g} s: {processes.describe(left)}", flush=True)
        launched.wait(STOP_DEADLINE_S)
