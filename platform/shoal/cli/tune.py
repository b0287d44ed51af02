"""The command ``tune``: the shell's, and a job's."""

from __future__ import annotations

import typer

from shoal.cli import options as opt
from shoal.cli.command import WORK, command
from shoal.cli.of_recipe import of_recipe
from shoal.recipe import Recipe


def add_to(app: typer.Typer) -> None:
    """Add ``shoal tune``."""
    examples = (
        "shoal tune jobs.digits lr=log:1e-4..1e-1",
        "shoal tune jobs.digits lr=log:1e-4..1e-1 hidden=64,128 dropout=0.0..0.5 --trials 32 --concurrent 2",
        "shoal tune jobs.digits lr=log:1e-4..1e-1 --workers 2",
        "shoal tune jobs.digits lr=log:1e-4..1e-1 dropout=0.0..0.5 --scheduler pbt --trials 4",
    )
    command(app, panel=WORK, examples=examples)(of_recipe(tune))


def tune(
    recipe: type[Recipe],
    space: opt.SpaceFields = None,
    trials: opt.Trials = None,
    concurrent: opt.Concurrent = None,
    workers: opt.TrialWorkers = 1,
    steps: opt.Steps = None,
    name: opt.SweepName = None,
    seed: opt.Seed = 0,
    precision: opt.Precision = "fp32",
    checkpoint_every: opt.CheckpointEvery = None,
    scheduler: opt.Scheduler = "asha",
    perturb_every: opt.PerturbEvery = None,
) -> None:
    """Search a recipe's fields for the best validation objective, and wait with a live table of trials.

    The same command goes on with a sweep that was stopped or killed; finished trials are not repeated.
    """
    from shoal.cli.tuning import tune_and_wait
    from shoal.tune import SweepOptions

    options = SweepOptions(
        trials=trials,
        concurrent=concurrent,
        workers=workers,
        steps=steps,
        name=name,
        seed=seed,
        precision=precision,
        checkpoint_every=checkpoint_every,
        scheduler=scheduler,
        perturb_every=perturb_every,
    )
    tune_and_wait(recipe, space or [], options)
