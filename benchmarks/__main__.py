"""Every benchmark, one after the other: ``make bench``. Starts and stops clusters of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.cluster import ROOT, own_cluster
from shoal.cluster import environment

ALONE = ("startup", "train", "checkpoint", "serve", "exact", "recovery", "goodput")
"""Need nothing, or start what they need."""
ON_A_CLUSTER = ("submit", "trials")
"""Both sides run on the cluster that the environment names."""
CLUSTER = "version: 1\nname: bench\nserve: {port: 0}\ntargets: {local: {cpu: 4}}\n"


def main() -> int:
    """Run them all; the exit status says whether every goal was met."""
    failed = [name for name in ALONE if not run(name, {})]
    with own_cluster(CLUSTER) as cluster:
        attached = dict(environment(cluster.info))
        failed += [name for name in ON_A_CLUSTER if not run(name, attached)]
    print(f"goals not met: {', '.join(failed)}" if failed else "every goal was met")
    return 1 if failed else 0


def run(name: str, extra: dict[str, str]) -> bool:
    """Run one benchmark in a process of its own."""
    print(f"\n== {name}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, env={**os.environ, **extra}, check=False
    )
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
