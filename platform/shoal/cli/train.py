"""The command ``train``: the shell's, and a job's."""

from __future__ import annotations

import typer

from shoal.cli import options as opt
from shoal.cli.command import WORK, command
from shoal.cli.of_recipe import of_recipe
from shoal.recipe import Recipe


def add_to(app: typer.Typer) -> None:
    """Add ``shoal train``."""
    examples = (
        "shoal train jobs.digits",
        "shoal train jobs.digits lr=1e-3 hidden=256 --workers 1..4 --steps 2000",
        "shoal train jobs.digits --init-from digits@champion --detach",
        "shoal train jobs.digits batch_size=1024 --dry-run",
    )
    command(app, panel=WORK, examples=examples)(of_recipe(train))


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
    exact: opt.Exact = None,
    shards: opt.Shards = None,
    init_from: opt.InitFrom = None,
    detach: opt.Detach = False,
    dry_run: opt.DryRun = False,
) -> None:
    """Train a recipe on the cluster, and wait for it with live progress. Under torchrun it needs no cluster.

    The same command goes on with the same run: after Ctrl-C, a crash, or to more steps. Ctrl-C commits a
    checkpoint and stops.
    """
    from shoal.cli.training import start
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
        exact=exact,
        shards=shards,
        init_from=init_from,
    )
    words = fields or []
    start(parse_fields(recipe, words), options, words=words, detach=detach, dry_run=dry_run)
