"""Drive a sweep as a test's subprocess: ``drive.py PROJECT FLAG_DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

import searched
from ray import cloudpickle
from searched import Line

from shoal.cluster import find
from shoal.tune import Sweep, start_sweep
from shoal.tune.space import loguniform


def start(info: object, flag_dir: str) -> Sweep:
    """The sweep that is killed and started again: the same arguments are the same sweep."""
    cloudpickle.register_pickle_by_value(searched)  # a cluster's processes have no tests on their path
    return start_sweep(
        info,  # type: ignore[arg-type]
        Line(flag_dir=flag_dir),
        {"lr": loguniform(1e-3, 1e-1)},
        trials=3,
        concurrent=1,
        name="killed-driver",
        scheduler="none",
    )


if __name__ == "__main__":
    start(find(Path(sys.argv[1])), sys.argv[2]).wait(progress=False)
