"""A sweep of one-worker trials: shoal beside raw Ray Tune with the same function, paired and interleaved.

Run it against a cluster that `shoal up` started, on a machine with nothing else to do, from the repository:
``eval $(shoal env); python -m benchmarks.trials [pairs]``. Both use that cluster, run the same number of trials at
the same time, and reuse actors. Each trial imports torch, builds a small model, trains it for one step, evaluates
it and reports once; shoal's trials also keep their record and commit a checkpoint. Time is from asking for
the sweep to its last result, divided by the number of trials.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import shoal
from benchmarks.quiet import wait_until_idle
from benchmarks.ratios import paired_ratio

NUM_TRIALS = 8
CONCURRENT = 2
GOAL = 1.1


class OneStep(shoal.Recipe):
    """As little training as there is."""

    steps = 1
    lr: float = 0.1

    def build_data(self) -> shoal.Datasets:
        import torch
        from torch.utils.data import TensorDataset

        x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        return shoal.Datasets(train=TensorDataset(x, 3 * x), val=TensorDataset(x, 3 * x))

    def build_model(self) -> Any:
        from torch import nn

        return nn.Linear(1, 1)

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return ((model(x) - y) ** 2).mean()


def one_step(config: dict[str, Any]) -> None:
    """The same, as one would write it for Ray Tune."""
    import torch
    from ray import tune
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    recipe = OneStep(lr=config["lr"])
    data = recipe.build_data()
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    recipe.loss(model, next(iter(DataLoader(data.train, recipe.batch_size, shuffle=True)))).backward()
    optimizer.step()
    with torch.no_grad():
        losses = [recipe.loss(model, batch).item() for batch in DataLoader(data.val, recipe.batch_size)]
    tune.report({"loss": statistics.mean(losses)})


def run_raw(name: str) -> None:
    from ray import tune

    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        tune.Tuner(
            tune.with_resources(one_step, {"CPU": 1}),
            param_space={"lr": tune.loguniform(1e-3, 1e-1)},
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                num_samples=NUM_TRIALS,
                max_concurrent_trials=CONCURRENT,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name=name, storage_path=folder, verbose=0),
        ).fit()


def run_shoal(name: str) -> None:
    from shoal.cluster import ClusterInfo
    from shoal.tune import SweepOptions, loguniform, start_sweep

    info = ClusterInfo.from_env()
    assert info is not None
    sweep = start_sweep(
        info,
        OneStep(),
        {"lr": loguniform(1e-3, 1e-1)},
        SweepOptions(trials=NUM_TRIALS, concurrent=CONCURRENT, name=name, scheduler="none"),
    ).wait(progress=False)
    assert all(trial.state == "finished" for trial in sweep.trials), sweep.frame()


def forget(name: str) -> None:
    """Delete what `run_shoal` left on the cluster's storage."""
    from shoal.cluster import ClusterInfo
    from shoal.storage import Storage

    info = ClusterInfo.from_env()
    assert info is not None
    storage = Storage(info.storage)
    for folder in [storage.sweep_dir(name), *storage.runs_dir.glob(f"{name}-t*")]:
        shutil.rmtree(folder)


def timed(run: Callable[[str], None], name: str) -> float:
    """Seconds per trial, on a machine that was idle before."""
    wait_until_idle()
    start = time.perf_counter()
    run(name)
    return (time.perf_counter() - start) / NUM_TRIALS


def measure(pairs: int) -> dict[str, list[float]]:
    """Seconds per trial of ``pairs`` pairs on the attached cluster, by side."""
    from ray import cloudpickle

    if __name__ != "__main__":
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a cluster's processes cannot import us
    order = random.Random(0)
    times: dict[str, list[float]] = {"shoal": [], "raw": []}
    for number in range(-1, pairs):  # the first of each pays for what the process imports once
        sides = [("shoal", run_shoal), ("raw", run_raw)]
        order.shuffle(sides)
        for side, run in sides:
            name = f"bench-{os.getpid()}-{number + 1}"
            seconds = timed(run, name)
            if side == "shoal":
                forget(name)
            if number >= 0:
                times[side].append(seconds)
        if number >= 0:
            told = ", ".join(f"{side} {t[-1]:.3f} s" for side, t in times.items())
            print(f"pair {number + 1}: {told} per trial", flush=True)
    return times


def main() -> int:
    """Print the table; 0 when the goal is met."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    from shoal.cluster import ClusterInfo
    from shoal.cluster.attach import attach

    info = ClusterInfo.from_env()
    if info is None:
        print("attach first: eval $(shoal env), then run again", file=sys.stderr)
        return 2
    attach(info)
    times = measure(pairs)
    ratio = paired_ratio(times["shoal"], times["raw"])
    print(
        f"a trial that imports torch and reports once ({CONCURRENT} at a time), shoal / raw Ray Tune: {ratio} "
        f"(goal: at most {GOAL}); median {statistics.median(times['shoal']):.3f} s / "
        f"{statistics.median(times['raw']):.3f} s per trial"
    )
    return 0 if ratio.high <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
