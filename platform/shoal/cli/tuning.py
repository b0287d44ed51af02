"""Search a recipe's fields on the running cluster, as ``shoal tune`` and a job's ``tune`` do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from shoal.cli.console import console, say, show_facts
from shoal.cli.interrupt import sigterm_interrupts
from shoal.errors import NotFoundError

if TYPE_CHECKING:
    from shoal.recipe import Recipe
    from shoal.tune import Sweep, SweepOptions


def tune_and_wait(cls: type[Recipe], words: Sequence[str], options: SweepOptions) -> None:
    """Search what ``words`` (``lr=log:1e-4..1e-1``, ``wd=1e-2``) say; shows the trials, then the best.

    Raises:
        RequestError: no cluster runs, or the search is impossible as asked.
        RecipeError, EnvironmentFailure: as `Sweep.wait`.
    """
    from shoal.cli.project import connect
    from shoal.recipe import from_fields
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
    show_best(sweep, then=f"shoal register {cls.__name__.lower()} {sweep.name} --alias champion")


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
