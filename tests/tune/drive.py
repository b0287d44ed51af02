"""Drive a sweep as a test's subprocess: ``drive.py PROJECT FLAG_DIR [NAME]``; with a name, a population."""

from __future__ import annotations

import sys
from pathlib import Path

import searched
from ray import cloudpickle
from searched import Line, Member

from shoal.cluster import find
from shoal.tune import Sweep, SweepOptions, start_sweep
from shoal.tune.space import loguniform


def start(info: object, flag_dir: str) -> Sweep:
    """The sweep that is killed and started again: the same arguments are the same sweep."""
    cloudpickle.register_pickle_by_value(searched)  # a cluster's processes have no tests on their path
    return start_sweep(
        info,  # type: ignore[arg-type]
        Line(flag_dir=flag_dir),
        {"lr": loguniform(1e-3, 1e-1)},
        SweepOptions(trials=3, concurrent=1, name="killed-driver", scheduler="none"),
    )


def start_population(info: object, flag_dir: str, *, name: str) -> Sweep:
    """Four trials that are compared every 40 of 200 steps."""
    cloudpickle.register_pickle_by_value(searched)
    return start_sweep(
        info,  # type: ignore[arg-type]
        Member(flag_dir=flag_dir),
        {"lr": loguniform(1e-4, 1e-1)},
        SweepOptions(trials=4, concurrent=4, name=name, scheduler="pbt", steps=200),
    )


if __name__ == "__main__":
    info, flag_dir, *name = find(Path(sys.argv[1])), *sys.argv[2:]
    sweep = start_population(info, flag_dir, name=name[0]) if name else start(info, flag_dir)
    sweep.wait(progress=False)
