"""The command ``train``: the shell's, and a job's. Trains on the running cluster, and waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from shoal.cli import options as opt
from shoal.cli.command import WORK, RecipeCommand, command, of_recipe
from shoal.cli.console import console, say
from shoal.cli.interrupt import sigterm_interrupts
from shoal.cli.project import connect
from shoal.errors import RequestError
from shoal.recipe import Recipe

if TYPE_CHECKING:
    from shoal.train.options import RunOptions


def add_to(app: typer.Typer) -> None:
    """Add ``shoal train``."""
    examples = (
        "shoal train jobs.digits",
        "shoal train jobs.digits lr=1e-3 hidden=256 --workers 1..4 --steps 2000",
        "shoal train jobs.digits --init-from digits@champion --detach",
        "shoal train jobs.digits batch_size=1024 --dry-run",
    )
    command(app, panel=WORK, examples=examples, cls=RecipeCommand)(of_recipe(train))


def train(
    recipe: type[Recipe],
    fields: opt.Fields = None,
    workers: opt.Workers = None,
    steps: opt.Steps = None,
    name: opt.Name = None,
    seed: opt.Seed = 0,
    precision: opt.Precision = "fp32",
    checkpoint_every: opt.CheckpointEvery = None,
    keep: opt.Keep = None,
    keep_best: opt.KeepBest = None,
    exact: opt.Exact = None,
    shards: opt.Shards = None,
    micro_batch: opt.MicroBatch = None,
    strategy: opt.Strategy = None,
    on_nan: opt.OnNan = None,
    init_from: opt.InitFrom = None,
    detach: opt.Detach = False,
    dry_run: opt.DryRun = False,
) -> None:
    """Train a recipe on the cluster, and wait for it with live progress. Under torchrun it needs no cluster.

    The same command goes on with the same run: after Ctrl-C, a crash, or to more steps. Ctrl-C commits a
    checkpoint and stops.
    """
    from shoal.recipe import parse_fields
    from shoal.train.options import RunOptions

    options = RunOptions(
        workers=workers,
        steps=steps,
        name=name,
        seed=seed,
        precision=precision,
        checkpoint_every=checkpoint_every,
        keep=keep,
        keep_best=keep_best,
        exact=exact,
        shards=shards,
        micro_batch=micro_batch,
        strategy=strategy,
        on_nan=on_nan,
        init_from=init_from,
    )
    words = fields or []
    start(parse_fields(recipe, words), options, words=words, detach=detach, dry_run=dry_run)


def start(recipe: Recipe, options: RunOptions, *, words: Sequence[str], detach: bool, dry_run: bool) -> None:
    """Train as the options say: here and now, on the cluster without us, or not at all.

    ``words`` are the recipe's fields as they were typed.

    Raises:
        RequestError, RecipeError, EnvironmentFailure: as `train_and_wait`.
    """
    from shoal.cli import torchrun

    if detach and dry_run:
        raise RequestError("--detach starts a run and --dry-run starts nothing: choose one")
    if torchrun.is_torchrun():
        if detach or dry_run:
            raise RequestError(
                f"{'--detach' if detach else '--dry-run'} takes one process: leave torchrun out"
            )
        torchrun.train_under_torchrun(recipe, options)
    elif dry_run:
        from shoal.cli.dry_run import dry_run as rehearse

        rehearse(recipe, options)
    elif detach:
        from shoal.cli.detached import train_detached

        train_detached(recipe, words, options)
    else:
        train_and_wait(recipe, options)


def train_and_wait(recipe: Recipe, options: RunOptions) -> None:
    """Train on the running cluster, driven by this process; shows progress, then the result.

    Ctrl-C and SIGTERM commit a checkpoint and stop; the same command goes on from there.

    Raises:
        RequestError: no cluster runs, or the run cannot be as asked.
        RecipeError, EnvironmentFailure: as `Run.wait`.
    """
    from shoal.cli.runs import show_result

    cluster = connect()
    with sigterm_interrupts():  # after attaching: Ray installs a handler of its own
        run = cluster.train(recipe, **vars(options))
        say(run.note or f"run {run.name}")
        try:
            run.wait()
        except KeyboardInterrupt:
            if not console().is_terminal:  # there the bar ended in a line that says as much
                show_result(run)
            raise
    show_result(run)
