"""The command ``tune``: the shell's, and a job's. Searches on the running cluster, and waits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from shoal.cli import options as opt
from shoal.cli.command import WORK, RecipeCommand, command, of_recipe
from shoal.cli.console import console, say, show_facts
from shoal.cli.interrupt import sigterm_interrupts
from shoal.cli.project import connect
from shoal.cli.runs import model_name
from shoal.errors import NotFoundError
from shoal.recipe import Recipe

if TYPE_CHECKING:
    from shoal.tune import Sweep, SweepOptions


def add_to(app: typer.Typer) -> None:
    """Add ``shoal tune``."""
    examples = (
        "shoal tune jobs.digits lr=log:1e-4..1e-1",
        "shoal tune jobs.digits lr=log:1e-4..1e-1 hidden=64,128 dropout=0.0..0.5 --trials 32",
        "shoal tune jobs.digits lr=log:1e-4..1e-1 --workers 2",
        "shoal tune jobs.digits lr=log:1e-4..1e-1 dropout=0.0..0.5 --scheduler pbt --trials 4",
    )
    command(app, panel=WORK, examples=examples, cls=RecipeCommand)(of_recipe(tune))


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


def tune_and_wait(cls: type[Recipe], words: Sequence[str], options: SweepOptions) -> None:
    """Search what ``words`` (``lr=log:1e-4..1e-1``, ``wd=1e-2``) say; shows the trials, then the best.

    Raises:
        RequestError: no cluster runs, or the search is impossible as asked.
        RecipeError, EnvironmentFailure: as `Sweep.wait`.
    """
    from shoal.recipe import from_fields, recipe_ref
    from shoal.tune import check_space, parse_space

    fixed, space = parse_space(words)
    recipe = from_fields(cls, fixed)
    check_space(recipe, space)  # before a second is spent on attaching
    cluster = connect()
    with sigterm_interrupts():
        sweep = cluster.tune(recipe, space, **vars(options))
        say(f"sweep {sweep.name}{f': {sweep.note}' if sweep.note else ''}")
        try:
            sweep.wait()
        except KeyboardInterrupt:
            if not console().is_terminal:  # there the table ended in a line that says as much
                show_best(sweep, then="the same command goes on with the sweep")
            raise
    show_best(sweep, then=f"shoal register {model_name(recipe_ref(cls))} {sweep.name} --alias champion")


def show_best(sweep: Sweep, *, then: str) -> None:
    """The trials, the best of them, and what to do ``then``."""
    from shoal.tune.show import fields_text, trials_table, value_text

    out = console()
    if not out.is_terminal:  # on one, the live table has just shown them
        out.print(trials_table(sweep.name, sweep.trials, sweep.objective, num_trials=len(sweep.trials)))
    facts = {"next": then}
    with suppress(NotFoundError):
        best = sweep.best
        facts = {"best": f"{best.run}  {value_text(best, sweep.objective)}  {fields_text(best)}", **facts}
    show_facts(facts)
