"""``shoal train``."""

from __future__ import annotations

import typer

from shoal.cli import options as opt
from shoal.cli.command import WORK, command


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    examples = (
        "shoal train jobs.digits",
        "shoal train jobs.digits lr=1e-3 hidden=256 --workers 1..4 --steps 2000",
        "shoal train jobs.digits --init-from digits@champion --detach",
        "shoal train jobs.digits batch_size=1024 --dry-run",
    )
    command(app, panel=WORK, examples=examples)(train)


def train(
    module: opt.Module,
    fields: opt.Fields = None,
    workers: opt.Workers = None,
    steps: opt.Steps = None,
    name: opt.Name = None,
    seed: opt.Seed = 0,
    precision: opt.Precision = "fp32",
    checkpoint_every: opt.CheckpointEvery = None,
    keep: opt.Keep = None,
    init_from: opt.InitFrom = None,
    detach: opt.Detach = False,
    dry_run: opt.DryRun = False,
) -> None:
    """Train a recipe on the cluster, and wait for it with live progress.

    The same command goes on with the same run: after Ctrl-C, a crash, or to more steps. Ctrl-C commits a
    checkpoint and stops.
    """
    from shoal.cli.place import load_recipe
    from shoal.cli.training import TrainOptions, start
    from shoal.recipe import parse_fields

    options = TrainOptions(
        workers=workers,
        steps=steps,
        name=name,
        seed=seed,
        precision=precision,
        checkpoint_every=checkpoint_every,
        keep=keep,
        init_from=init_from,
    )
    words = fields or []
    start(parse_fields(load_recipe(module), words), options, words=words, detach=detach, dry_run=dry_run)
